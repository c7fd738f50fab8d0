"""What there is to know of preference data before a day of training is spent on it.

`check_splits` measures; the thresholds below say what is refused (error) and what is only told (warning). The same
function runs in `prefvec data check` and at the start of every training job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from datasets import Dataset
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from prefvec_ray.preferences.data import iter_rows
from prefvec_ray.preferences.splits import Split, text_key

SAMPLE = 2000
"""Pairs of a split that are tokenized for lengths, evenly spaced over the rows; smaller splits are tokenized whole."""

# Shares. Above the first of a pair the data is refused, above the second there is a warning.
IDENTICAL = (0.5, 0.05)
"""Rows whose two answers are identical."""
DROPPED = (0.5, 0.05)
"""Rows left out for any reason: identical or empty answers, conversations that differ."""
DUPLICATES = (0.5, 0.05)
"""Pairs that repeat another pair."""
CONTRADICTIONS = (0.1, 0.0)
"""Distinct pairs that occur in both orders: their gradients cancel."""
SHARED_PROMPTS = (0.1, 0.0)
"""Held-out prompts that are trained on: held-out accuracy would be a lie."""
LEFT_OUT = (0.5, 0.05)
"""Pairs whose prompt alone fills max_length: TRL drops them."""
CUT_EQUAL = (0.5, 0.01)
"""Pairs whose answers are the same up to max_length."""
# Only warnings.
TRUNCATED = 0.2
"""Pairs longer than max_length: their ends are not trained on."""
LONGER = 0.7
"""Pairs in which the longer answer is on one side: length alone predicts the label (arXiv 2310.03716)."""
PLACE = 0.8
"""Labels on one of the two places."""
FEW_HELD_OUT = 50
"""Held-out pairs; below it the standard error of an accuracy is above 0.07."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True)


class Finding(_Plain):
    """One line that names the preference, the fact and what to do."""

    level: Literal["error", "warning"]
    text: str


class Lengths(_Plain):
    """Tokens after the chat template, of the sampled pairs, as {"p50", "p90", "p99", "max"}."""

    sampled: int
    prompt: dict[str, int]
    chosen: dict[str, int]
    rejected: dict[str, int]
    whole: dict[str, int]
    """Prompt and the longer answer."""
    max_length: int | None
    truncated: int
    left_out: int
    cut_equal: int
    prompt_changes: int
    """Pairs whose tokenized prompt is no beginning of prompt and answer together."""


class PreferenceCheck(_Plain):
    source: str
    format: str
    why: str
    conversational: bool
    rows: int
    unreadable: int
    dropped: dict[str, int]
    pairs: int
    held_out: int
    prompts: int
    """Distinct prompts, white space aside, of training and held-out pairs together."""
    shared_prompts: int
    """Distinct held-out prompts that are also trained on."""
    held_out_prompts: int
    duplicates: int
    contradictions: int
    chosen_longer: float
    """Share of training pairs whose chosen answer has more characters; equal lengths count half."""
    labels: dict[str, int]
    system_messages: int
    lengths: Lengths | None


class Overlap(_Plain):
    """Pairs that two preferences both have, and how many of them they order in opposite ways."""

    preferences: tuple[str, str]
    shared: int
    opposite: int


class DataCheck(_Plain):
    preferences: dict[str, PreferenceCheck]
    overlaps: list[Overlap]
    findings: list[Finding]

    @property
    def errors(self) -> list[str]:
        return [finding.text for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[str]:
        return [finding.text for finding in self.findings if finding.level == "warning"]


def check_splits(
    splits: Mapping[str, Split],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> DataCheck:
    """Measure every preference's pairs, and say what is wrong with them.

    Args:
        splits: by name of the preference.
        tokenizer: of the base, with the chat template that it is trained with; without it lengths are not measured.
        max_length: of the DPO recipe, in tokens; None: no limit.
    """
    facts = {name: (_facts(split.train), _facts(split.test)) for name, split in splits.items()}
    findings: list[Finding] = []
    checks = {}
    for name, split in splits.items():
        lengths = None
        if tokenizer is not None:
            lengths, told = _lengths(name, split, tokenizer, max_length)
            findings += told
        checks[name] = _measure(split, *facts[name], lengths)
        findings += _judge(name, checks[name], split)
    overlaps = []
    for i, first in enumerate(splits):
        for second in list(splits)[i + 1 :]:
            overlap = _overlap(
                (first, second),
                *({k: np.concatenate([f[k] for f in facts[n]]) for k in ("pair", "order")} for n in (first, second)),
            )
            overlaps.append(overlap)
            findings += _judge_overlap(overlap)
    return DataCheck(preferences=checks, overlaps=overlaps, findings=findings)


Facts = dict[str, np.ndarray]


def _facts(dataset: Dataset) -> Facts:
    """Per pair: hashes of the prompt, of the pair whichever way round, its order, of the ordered pair; characters."""
    n = len(dataset)
    facts = {name: np.zeros(n, np.uint64) for name in ("prompt", "pair", "exact")}
    facts |= {name: np.zeros(n, np.int64) for name in ("chosen", "rejected")}
    facts |= {"order": np.zeros(n, bool), "system": np.zeros(n, bool)}
    for i, row in enumerate(iter_rows(dataset)):
        prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
        facts["prompt"][i] = text_key(prompt)
        facts["system"][i] = not isinstance(prompt, str) and any(turn["role"] == "system" for turn in prompt)
        parts = [blake3(repr(text).encode("utf-8", "surrogatepass")).digest(16) for text in (prompt, chosen, rejected)]
        facts["exact"][i] = _key(*parts)
        facts["pair"][i] = _key(parts[0], *sorted(parts[1:]))
        facts["order"][i] = parts[1] < parts[2]
        facts["chosen"][i], facts["rejected"][i] = _characters(chosen), _characters(rejected)
    return facts


def _key(*parts: bytes) -> int:
    return int.from_bytes(blake3(b"".join(parts)).digest(8), "little")


def _characters(answer: Any) -> int:
    return len(answer) if isinstance(answer, str) else sum(len(turn["content"]) for turn in answer)


def _measure(split: Split, train: Facts, test: Facts, lengths: Lengths | None) -> PreferenceCheck:
    loaded, loaded_test = split.loaded, split.loaded_test
    both = {name: np.concatenate([train[name], test[name]]) for name in ("prompt", "exact", "pair", "order", "system")}
    distinct = np.unique(both["exact"], return_index=True)[1]
    _, times = np.unique(both["pair"][distinct], return_counts=True)
    dropped = dict(loaded.dropped)
    for reason, count in (loaded_test.dropped if loaded_test else {}).items():
        dropped[reason] = dropped.get(reason, 0) + count
    longer = np.sign(train["chosen"] - train["rejected"])
    return PreferenceCheck(
        source=loaded.source,
        format=loaded.format,
        why=loaded.why,
        conversational=not isinstance(loaded.dataset[0]["prompt"], str),
        rows=loaded.rows + (loaded_test.rows if loaded_test else 0),
        unreadable=len(split.flaws),
        dropped=dropped,
        pairs=len(split.train),
        held_out=len(split.test),
        prompts=len(np.unique(both["prompt"])),
        shared_prompts=len(np.intersect1d(train["prompt"], test["prompt"])),
        held_out_prompts=len(np.unique(test["prompt"])),
        duplicates=len(both["exact"]) - len(distinct),
        contradictions=int((times > 1).sum()),
        chosen_longer=round(float((longer.mean() + 1) / 2), 4) if len(longer) else 0.5,
        labels=dict(loaded.labels),
        system_messages=int(both["system"].sum()),
        lengths=lengths,
    )


def _lengths(
    name: str, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Lengths | None, list[Finding]]:
    """Tokenize a sample of the training pairs as TRL does."""
    count = min(len(split.train), SAMPLE)
    if not count:
        return None, []
    sample = split.train.select(np.linspace(0, len(split.train) - 1, count).astype(int))
    if tokenizer.chat_template is None and not isinstance(sample[0]["prompt"], str):
        return None, [
            _error(
                f"{name}: the pairs are conversations, and the base's tokenizer has no chat template; "
                "set chat_template to a Jinja file or to 'transcript'"
            )
        ]
    tokens: dict[str, list[int]] = {key: [] for key in ("prompt", "chosen", "rejected", "whole")}
    truncated = left_out = cut_equal = prompt_changes = refused = 0
    reason = ""
    for row in iter_rows(sample):
        try:
            prompt, chosen, rejected = _tokenize(row, tokenizer)
        except TemplateError as error:
            refused, reason = refused + 1, reason or str(error)
            continue
        shared = min(_common(prompt, chosen), _common(prompt, rejected))
        whole = max(len(chosen), len(rejected))
        prompt_changes += shared < len(prompt)
        for key, length in zip(tokens, (shared, len(chosen) - shared, len(rejected) - shared, whole), strict=True):
            tokens[key].append(length)
        if max_length is not None:
            truncated += whole > max_length
            left_out += shared >= max_length
            cut_equal += shared < max_length and chosen[:max_length] == rejected[:max_length]
    told = []
    if refused:
        hint = "; set system: fold to put them into the first user message" if "system" in reason.lower() else ""
        told.append(
            _error(f"{name}: the base's chat template refuses {refused} of {count} pairs ({reason:.200}){hint}")
        )
    if not tokens["whole"]:
        return None, told
    return Lengths(
        sampled=len(tokens["whole"]),
        **{key: _percentiles(values) for key, values in tokens.items()},
        max_length=max_length,
        truncated=truncated,
        left_out=left_out,
        cut_equal=cut_equal,
        prompt_changes=prompt_changes,
    ), told


def _tokenize(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompt, of prompt and chosen, of prompt and rejected: what TRL's DPOTrainer cuts apart."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        texts = [prompt, *(prompt + row[side] + (tokenizer.eos_token or "") for side in ("chosen", "rejected"))]
        return tokenizer(texts)["input_ids"]
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)]
    texts += [tokenizer.apply_chat_template(prompt + row[side], tokenize=False) for side in ("chosen", "rejected")]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    if first == second[: len(first)]:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip([*first, None], [*second, None], strict=False)) if a != b)


def _percentiles(values: list[int]) -> dict[str, int]:
    return {f"p{q}": int(np.percentile(values, q, method="higher")) for q in (50, 90, 99)} | {"max": max(values)}


def _judge(name: str, check: PreferenceCheck, split: Split) -> list[Finding]:
    """Findings of one preference, by the thresholds at the top."""
    found: list[Finding] = []

    def share(part: int, whole: int, limits: tuple[float, float], text: str) -> None:
        level = next(
            (level for level, limit in zip(("error", "warning"), limits, strict=True) if part > limit * whole), None
        )
        if level is not None:
            found.append(Finding(level=level, text=f"{name}: {part} of {whole} {text}"))  # type: ignore[arg-type]

    if check.unreadable:
        found.append(
            _error(f"{name}: {check.unreadable} of {check.rows} rows cannot be used; the first: {split.flaws[0]}")
        )
    identical = sum(count for reason, count in check.dropped.items() if "identical" in reason)
    dropped = sum(check.dropped.values())
    if identical > IDENTICAL[1] * check.rows:
        share(identical, check.rows, IDENTICAL, "rows have two identical answers; check how the pairs were made")
    else:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in check.dropped.items())
        share(dropped, check.rows, DROPPED, f"rows say nothing and are left out ({reasons})")
    for what, count in (("to train on", check.pairs), ("held out", check.held_out)):
        if not count:
            found.append(_error(f"{name}: no pairs {what}; give more rows, a test file, or another test_fraction"))
    share(check.duplicates, check.pairs + check.held_out, DUPLICATES, "pairs repeat another pair; remove the copies")
    share(check.contradictions, check.pairs + check.held_out, CONTRADICTIONS, "pairs occur in both orders; keep one")
    share(
        check.shared_prompts,
        check.held_out_prompts,
        SHARED_PROMPTS,
        "held-out prompts are trained on; hold out other prompts, or give no test file and let it be split",
    )
    if 0 < check.held_out < FEW_HELD_OUT:
        error = 0.5 / check.held_out**0.5
        found.append(_warning(f"{name}: {check.held_out} pairs held out: accuracy is known to ±{error:.2f} only"))
    if max(check.chosen_longer, 1 - check.chosen_longer) > LONGER:
        side = "chosen" if check.chosen_longer > 0.5 else "rejected"
        part = max(check.chosen_longer, 1 - check.chosen_longer)
        found.append(
            _warning(
                f"{name}: the {side} answer is the longer one in {part:.0%} of the pairs; the vector may "
                "learn length: balance the pairs, or measure the length of answers in the evaluation"
            )
        )
    total = sum(check.labels.values())
    for place, count in check.labels.items():
        if count > PLACE * total:
            found.append(
                _warning(f"{name}: {place} is the chosen one in {count} of {total} rows; are the labels real?")
            )
    if check.lengths is not None and check.lengths.max_length is not None:
        lengths, limit = check.lengths, check.lengths.max_length
        share(lengths.left_out, lengths.sampled, LEFT_OUT, f"pairs are dropped: the prompt fills max_length {limit}")
        share(lengths.cut_equal, lengths.sampled, CUT_EQUAL, f"pairs have equal answers up to max_length {limit}")
        share(lengths.truncated, lengths.sampled, (1.0, TRUNCATED), f"pairs are cut at max_length {limit}; raise it")
    if check.lengths is not None and check.lengths.prompt_changes:
        found.append(
            _warning(
                f"{name}: {check.lengths.prompt_changes} of {check.lengths.sampled} prompts are tokenized "
                "otherwise when an answer follows; the last tokens of the prompt are left out of training"
            )
        )
    return found


def _overlap(names: tuple[str, str], first: Facts, second: Facts) -> Overlap:
    _, i, j = np.intersect1d(first["pair"], second["pair"], return_indices=True)
    return Overlap(preferences=names, shared=len(i), opposite=int((first["order"][i] != second["order"][j]).sum()))


def _judge_overlap(overlap: Overlap) -> list[Finding]:
    if overlap.shared < FEW_HELD_OUT or 0 < overlap.opposite < overlap.shared:
        return []
    how = (
        "the same way: both vectors will be the same"
        if not overlap.opposite
        else "oppositely: one vector is minus the other"
    )
    names = " and ".join(overlap.preferences)
    return [_warning(f"{names} order all {overlap.shared} pairs that they share {how}; check the labels")]


def _error(text: str) -> Finding:
    return Finding(level="error", text=text)


def _warning(text: str) -> Finding:
    return Finding(level="warning", text=text)

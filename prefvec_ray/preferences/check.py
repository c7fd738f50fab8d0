"""Checks of preference data, before a day of training is spent on it.

`check_splits` measures. The thresholds below say what is refused (error) and what is only reported (warning). The same
function runs in `prefvec data check` and at the start of every training job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefvec_ray.preferences.demonstrations import DemonstrationCheck
from prefvec_ray.preferences.measures import (
    SAMPLE,
    Lengths,
    Overlap,
    Plain,
    PreferenceCheck,
    measure,
    measure_lengths,
    measure_overlap,
    pair_facts,
)
from prefvec_ray.preferences.splits import Split

# Shares. Above the first of a pair the data is refused, above the second there is a warning.
DROPPED = (0.5, 0.05)
"""Rows left out: identical or empty answers, equal scores, conversations that differ."""
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
REPEATED = (0.5, 0.01)
"""Text pairs in which both answers begin with the prompt: it would be trained on twice."""
# Only warnings.
TRUNCATED = 0.2
"""Pairs longer than max_length: their ends are not trained on."""
LONGER = 0.7
"""Pairs in which the longer answer is on one side: length alone predicts the label (arXiv 2310.03716)."""
PLACE = 0.8
"""Labels on one of the two places."""
FEW_HELD_OUT = 50
"""Held-out pairs; below it the standard error of an accuracy is above 0.07."""


Level = Literal["error", "warning"]
LEVELS: tuple[Level, Level] = ("error", "warning")


class Finding(Plain):
    """One line that names the preference, the fact and what to do."""

    level: Level
    preference: str
    text: str
    """Begins with the preference."""


class DataCheck(Plain):
    preferences: dict[str, PreferenceCheck]
    overlaps: list[Overlap]
    findings: list[Finding]
    demonstrations: DemonstrationCheck | None = None
    """Of the SFT stage; None: there is none."""

    @property
    def errors(self) -> list[str]:
        more = self.demonstrations.errors if self.demonstrations else []
        return [finding.text for finding in self.findings if finding.level == "error"] + more

    @property
    def warnings(self) -> list[str]:
        more = self.demonstrations.warnings if self.demonstrations else []
        return [finding.text for finding in self.findings if finding.level == "warning"] + more


def check_splits(
    splits: Mapping[str, Split],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    context: int | None = None,
    ends: frozenset[int] | None = None,
) -> DataCheck:
    """Measure every preference's pairs, and report what is wrong with them.

    Args:
        splits: by name of the preference.
        tokenizer: of the base, with the chat template that it is trained with; without it lengths are not measured.
        max_length: of the DPO recipe, in tokens; None: no limit.
        context: tokens that the base has positions for; None: not known.
        ends: ids of the tokens that end the base's answers; None: the tokenizer's end token.
    """
    facts = {name: (pair_facts(split.train), pair_facts(split.test)) for name, split in splits.items()}
    checks = {}
    for name, split in splits.items():
        measurable = tokenizer is not None and len(split.train)
        lengths = measure_lengths(split.train, tokenizer, max_length, ends) if measurable else None
        checks[name] = measure(split, *facts[name], lengths)
    whole = {name: {k: np.concatenate([f[k] for f in parts]) for k in parts[0]} for name, parts in facts.items()}
    overlaps = [measure_overlap(names, whole[names[0]], whole[names[1]]) for names in combinations(splits, 2)]
    findings = [finding for name, split in splits.items() for finding in _judge(name, checks[name], split)]
    findings += [finding for name, check in checks.items() for finding in _judge_context(name, check.lengths, context)]
    findings += [finding for overlap in overlaps for finding in _judge_overlap(overlap)]
    return DataCheck(preferences=checks, overlaps=overlaps, findings=findings)


def _judge(name: str, check: PreferenceCheck, split: Split) -> Iterator[Finding]:
    """Findings of one preference, by the thresholds at the top."""
    if check.unreadable > split.skip_bad:
        rows = f"{check.unreadable} of {check.rows} rows cannot be used; the first: {split.flaws[0]}"
        yield _finding("error", name, rows)
    else:
        for flaw in split.flaws:
            yield _finding("warning", name, f"row left out (skip_bad): {flaw}")
    reasons = "; ".join(f"{reason}: {count}" for reason, count in check.dropped.items())
    left_out = f"rows say nothing and are left out ({reasons})"
    yield from _share(name, sum(check.dropped.values()), check.rows, DROPPED, left_out)
    for what, count in (("to train on", check.pairs), ("held out", check.held_out)):
        if not count:
            advice = "give more rows, a test file, or another test_fraction"
            yield _finding("error", name, f"no pairs {what}; {advice}")
    pairs = check.pairs + check.held_out
    yield from _share(name, check.duplicates, pairs, DUPLICATES, "pairs repeat another pair; remove the copies")
    repeated = "pairs repeat the prompt in both answers; leave the field 'prompt' out, or give the answers alone"
    yield from _share(name, check.repeated_prompts, pairs, REPEATED, repeated)
    yield from _share(name, check.contradictions, pairs, CONTRADICTIONS, "pairs occur in both orders; keep one")
    shared = "held-out prompts are trained on; hold out other prompts, or give no test file and let it be split"
    yield from _share(name, check.shared_prompts, check.held_out_prompts, SHARED_PROMPTS, shared)
    if 0 < check.held_out < FEW_HELD_OUT:
        error = 0.5 / check.held_out**0.5
        yield _finding("warning", name, f"{check.held_out} pairs held out: accuracy is known to ±{error:.2f} only")
    yield from _judge_labels(name, check)
    if check.lengths is not None:
        yield from _judge_lengths(name, check, check.lengths)


def _judge_labels(name: str, check: PreferenceCheck) -> Iterator[Finding]:
    """What predicts the label beside the content of the answers: their length, their place."""
    part = max(check.chosen_longer, 1 - check.chosen_longer)
    if part > LONGER:
        side = "chosen" if check.chosen_longer > 0.5 else "rejected"
        advice = "balance the pairs, or measure the length of answers in the evaluation"
        longer = (
            f"the {side} answer is the longer one in {part:.0%} of the pairs; the vector may learn length: {advice}"
        )
        yield _finding("warning", name, longer)
    total = sum(check.labels.values())
    for place, count in check.labels.items():
        if count > PLACE * total:
            text = f"{place} is the chosen one in {count} of {total} rows; are the labels real?"
            yield _finding("warning", name, text)


def _judge_lengths(name: str, check: PreferenceCheck, lengths: Lengths) -> Iterator[Finding]:
    if lengths.refused:
        hint = "; or set system: fold to move them into the first user message" * (check.system_messages > 0)
        text = f"the base's chat template refuses {lengths.refused} of {min(check.pairs, SAMPLE)} pairs"
        yield _finding("error", name, f"{text} ({lengths.refusal:.200}){hint}")
    if lengths.appends_eos and not check.conversational:
        ended = "the base's tokenizer puts its end token behind every text, so behind every prompt"
        yield _finding("error", name, f"{ended}; set add_eos_token: false in its tokenizer_config.json")
    if (limit := lengths.max_length) is not None:
        filled = f"pairs are dropped: the prompt fills max_length {limit}"
        equal = f"pairs have equal answers up to max_length {limit}"
        cut = f"pairs are cut at max_length {limit}; raise it"
        yield from _share(name, lengths.left_out, lengths.sampled, LEFT_OUT, filled)
        yield from _share(name, lengths.cut_equal, lengths.sampled, CUT_EQUAL, equal)
        yield from _share(name, lengths.truncated, lengths.sampled, (1.0, TRUNCATED), cut)
    conversations = f"of {lengths.sampled} conversations, by the chat template"
    if lengths.no_bos:
        advice = "begin the template with {{ bos_token }}"
        text = f"{lengths.no_bos} {conversations}, lack the BOS token that the tokenizer puts before text; {advice}"
        yield _finding("warning", name, text)
    if lengths.no_end:
        text = f"{lengths.no_end} {conversations}, have no end token after the answer ({lengths.no_end_example!r:.120})"
        yield _finding("warning", name, f"{text}: the model learns no end; write {{{{ eos_token }}}} after an answer")
    if lengths.other_end:
        text = f"{lengths.other_end} {conversations}, end with {lengths.other_end_example!r:.60}"
        advice = "add it to eos_token_id in the base's generation_config.json"
        yield _finding("warning", name, f"{text}, which ends no answer of this base: {advice}")
    if lengths.typed:
        text = f"{lengths.typed} of {lengths.sampled} pairs have {lengths.typed_example!r:.60} in their own text"
        yield _finding("warning", name, f"{text}: it is trained on as that special token; remove it from the data")
    if lengths.prompt_changes:
        changed = (
            f"{lengths.prompt_changes} of {lengths.sampled} prompts are tokenized otherwise when an answer follows"
        )
        yield _finding("warning", name, f"{changed}; the last tokens of the prompt are left out of training")


def _judge_context(name: str, lengths: Lengths | None, context: int | None) -> Iterator[Finding]:
    if lengths is None or not lengths.sampled or context is None:
        return
    longest = min(lengths.whole["max"], lengths.max_length or lengths.whole["max"])
    if longest > context:
        text = f"pairs of up to {longest} tokens, and the base has a context of {context}"
        yield _finding("error", name, f"{text}; set dpo.max_length to {context} or less")


def _judge_overlap(overlap: Overlap) -> Iterator[Finding]:
    if overlap.shared < FEW_HELD_OUT or 0 < overlap.opposite < overlap.shared:
        return
    how = (
        "oppositely: one vector is minus the other"
        if overlap.opposite
        else "the same way: both vectors will be the same"
    )
    first, second = overlap.preferences
    text = f"orders all {overlap.shared} pairs that it shares with {second} {how}; check the labels"
    yield _finding("warning", first, text)


def _share(name: str, part: int, whole: int, limits: tuple[float, float], text: str) -> Iterator[Finding]:
    """An error above the first limit, a warning above the second."""
    for level, limit in zip(LEVELS, limits, strict=True):
        if part > limit * whole:
            yield _finding(level, name, f"{part} of {whole} {text}")
            return


def _finding(level: Level, name: str, text: str) -> Finding:
    return Finding(level=level, preference=name, text=f"{name}: {text}")

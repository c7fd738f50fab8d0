"""Figures of preference data: counts, lengths in tokens, what two preferences have in common. No opinions."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from blake3 import blake3
from datasets import Dataset
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from prefvec_ray.common.chat import appends_eos, begins_with_bos, end_tokens, names_pattern, special_ids, special_tokens
from prefvec_ray.preferences.data import iter_rows
from prefvec_ray.preferences.splits import Split, text_key

_TAIL = 4
"""Tokens at the end of a conversation among which its end token is: some templates write a line break after it."""
SAMPLE = 2000
"""Pairs of a split that are tokenized for lengths, evenly spaced over the rows; smaller splits are tokenized whole."""


class Plain(BaseModel):
    model_config = ConfigDict(frozen=True)


class Lengths(Plain):
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
    appends_eos: bool
    """The tokenizer puts its end token behind every text, prompts of plain text included."""
    prompt_changes: int
    """Pairs whose tokenized prompt is no beginning of prompt and answer together."""
    no_bos: int
    """Conversations that lack the BOS token that the tokenizer puts before text."""
    no_end: int
    """Conversations with no special token after the answer."""
    no_end_example: str
    """How the first of them ends."""
    other_end: int
    """Conversations whose answer ends with a special token that is no end token of the base."""
    other_end_example: str
    """That token, of the first of them."""
    typed: int
    """Pairs whose own text names a special token: it is tokenized as that token."""
    typed_example: str
    """That name, of the first of them."""
    refused: int
    """Pairs that the chat template does not take."""
    refusal: str
    """Its message for the first of them."""


class PreferenceCheck(Plain):
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
    repeated_prompts: int
    """Text pairs in which both answers begin with the prompt."""
    lengths: Lengths | None


class Overlap(Plain):
    """Pairs that two preferences both have, and how many of them they order in opposite ways."""

    preferences: tuple[str, str]
    shared: int
    opposite: int


Facts = dict[str, np.ndarray]


def pair_facts(dataset: Dataset) -> Facts:
    """Arrays with an entry a pair.

    Hashes (uint64): `prompt`, white space aside; `pair`, the same whichever answer is the chosen one; `exact`, of the
    ordered pair. `order`: which way round. `chosen`, `rejected`: characters. `system`: there is a system message.
    `repeated`: both answers begin with the prompt's text.
    """
    columns = {name: array("Q") for name in ("prompt", "first", "second", "chosen", "rejected", "system", "repeated")}
    for row in iter_rows(dataset):
        prompt, chosen, rejected = row["prompt"], _text(row["chosen"]), _text(row["rejected"])
        columns["prompt"].append(text_key(prompt))
        columns["first"].append(_key(chosen))
        columns["second"].append(_key(rejected))
        columns["chosen"].append(len(chosen))
        columns["rejected"].append(len(rejected))
        columns["system"].append(not isinstance(prompt, str) and any(turn["role"] == "system" for turn in prompt))
        columns["repeated"].append(
            isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt)
        )
    prompts, first, second, chosen_lengths, rejected_lengths, system, repeated = (
        np.array(values, np.uint64) for values in columns.values()
    )
    return {
        "prompt": prompts,
        # Sums of hashes are hashes; they wrap around at 64 bits.
        "pair": prompts + np.uint64(3) * (first + second),
        "exact": prompts + np.uint64(3) * first + second,
        "order": first < second,
        "chosen": chosen_lengths.astype(np.int64),
        "rejected": rejected_lengths.astype(np.int64),
        "system": system.astype(bool),
        "repeated": repeated.astype(bool),
    }


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "\n".join(turn["content"] for turn in answer)


def _key(text: str) -> int:
    return int.from_bytes(blake3(text.encode()).digest(8), "little")


def measure(split: Split, train: Facts, test: Facts, lengths: Lengths | None) -> PreferenceCheck:
    """Count; `train` and `test` are the `pair_facts` of the two parts."""
    loaded, loaded_test = split.loaded, split.loaded_test
    both = {
        name: np.concatenate([train[name], test[name]])
        for name in ("prompt", "exact", "pair", "order", "system", "repeated")
    }
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
        repeated_prompts=int(both["repeated"].sum()),
        lengths=lengths,
    )


def measure_lengths(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    ends: frozenset[int] | None = None,
) -> Lengths:
    """Tokenize a sample of the pairs as TRL does. `ends`: ids that end an answer, by default the tokenizer's."""
    count = min(len(dataset), SAMPLE)
    sample = dataset.select(np.linspace(0, len(dataset) - 1, count).astype(int))
    tokens: dict[str, list[int]] = {key: [] for key in ("prompt", "chosen", "rejected", "whole")}
    truncated = left_out = cut_equal = prompt_changes = refused = 0
    refusal = ""
    frame = Frame(tokenizer, ends)
    names = names_pattern(special_tokens(tokenizer))
    typed: list[str] = []
    for row in iter_rows(sample):
        typed += [found[0] for found in [names.search(_whole_text(row))] if found]
        try:
            prompt, chosen, rejected = tokenize_pair(row, tokenizer)
        except TemplateError as error:
            refused, refusal = refused + 1, refusal or str(error)
            continue
        if not isinstance(row["prompt"], str):
            frame.count(chosen)
        shared = min(common_length(prompt, chosen), common_length(prompt, rejected))
        whole = max(len(chosen), len(rejected))
        prompt_changes += shared < len(prompt)
        for key, length in zip(tokens, (shared, len(chosen) - shared, len(rejected) - shared, whole), strict=True):
            tokens[key].append(length)
        if max_length is not None:
            truncated += whole > max_length
            left_out += shared >= max_length
            cut_equal += shared < max_length and chosen[:max_length] == rejected[:max_length]
    return Lengths(
        sampled=len(tokens["whole"]),
        **{key: percentiles(values) for key, values in tokens.items()},
        max_length=max_length,
        truncated=truncated,
        left_out=left_out,
        cut_equal=cut_equal,
        appends_eos=appends_eos(tokenizer),
        prompt_changes=prompt_changes,
        no_bos=frame.no_bos,
        no_end=len(frame.no_end),
        no_end_example=next(iter(frame.no_end), ""),
        other_end=len(frame.other_end),
        other_end_example=next(iter(frame.other_end), ""),
        typed=len(typed),
        typed_example=next(iter(typed), ""),
        refused=refused,
        refusal=refusal,
    )


def _whole_text(row: Mapping[str, Any]) -> str:
    return "\n".join(_text(row[part]) for part in ("prompt", "chosen", "rejected"))


class Frame:
    """Counts what is wrong with the special tokens around conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int] | None) -> None:
        self.tokenizer = tokenizer
        self.ends = end_tokens(None, tokenizer) if ends is None else ends
        self.special = special_ids(tokenizer)
        self.bos = tokenizer.bos_token_id if begins_with_bos(tokenizer) else None
        self.no_bos = 0
        self.no_end: list[str] = []
        self.other_end: list[str] = []

    def count(self, ids: list[int]) -> None:
        self.no_bos += self.bos is not None and ids[:1] != [self.bos]
        found = [token for token in ids[-_TAIL:] if token in self.special]
        if not found:
            self.no_end.append(self.tokenizer.decode(ids[-_TAIL:]))
        elif not self.ends & set(found):
            self.other_end.append(self.tokenizer.decode(found[:1]))


def tokenize_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompt, of prompt and chosen, of prompt and rejected: what TRL's DPOTrainer cuts apart."""
    if tokenizer.chat_template is None and not isinstance(row["prompt"], str):
        raise TemplateError("there is no chat template; set chat_template to a Jinja file or to 'transcript'")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        texts = [prompt, *(prompt + row[side] + (tokenizer.eos_token or "") for side in ("chosen", "rejected"))]
        return tokenizer(texts, verbose=False)["input_ids"]
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)]
    texts += [tokenizer.apply_chat_template(prompt + row[side], tokenize=False) for side in ("chosen", "rejected")]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def common_length(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    if first == second[: len(first)]:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip([*first, None], [*second, None], strict=False)) if a != b)


def percentiles(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    return {f"p{q}": int(np.percentile(values, q, method="higher")) for q in (50, 90, 99)} | {"max": max(values)}


def measure_overlap(names: tuple[str, str], first: Facts, second: Facts) -> Overlap:
    """Pairs that both have, whichever way round."""
    _, i, j = np.intersect1d(first["pair"], second["pair"], return_indices=True)
    return Overlap(preferences=names, shared=len(i), opposite=int((first["order"][i] != second["order"][j]).sum()))

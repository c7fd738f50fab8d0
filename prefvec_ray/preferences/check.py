"""What there is to know of preference data before a day of training is spent on it.

`check_splits` measures; the thresholds below say what is refused (error) and what is only told (warning). The same
function runs in `prefvec data check` and at the start of every training job.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefvec_ray.preferences.measures import (
    SAMPLE,
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
# Only warnings.
TRUNCATED = 0.2
"""Pairs longer than max_length: their ends are not trained on."""
LONGER = 0.7
"""Pairs in which the longer answer is on one side: length alone predicts the label (arXiv 2310.03716)."""
PLACE = 0.8
"""Labels on one of the two places."""
FEW_HELD_OUT = 50
"""Held-out pairs; below it the standard error of an accuracy is above 0.07."""


class Finding(Plain):
    """One line that names the preference, the fact and what to do."""

    level: Literal["error", "warning"]
    preference: str
    text: str
    """Begins with the preference."""


class DataCheck(Plain):
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
    facts = {name: (pair_facts(split.train), pair_facts(split.test)) for name, split in splits.items()}
    checks = {}
    for name, split in splits.items():
        measurable = tokenizer is not None and len(split.train)
        lengths = measure_lengths(split.train, tokenizer, max_length) if measurable else None
        checks[name] = measure(split, *facts[name], lengths)
    whole = {name: {k: np.concatenate([f[k] for f in parts]) for k in parts[0]} for name, parts in facts.items()}
    overlaps = [measure_overlap(names, whole[names[0]], whole[names[1]]) for names in combinations(splits, 2)]
    findings = [finding for name, split in splits.items() for finding in _judge(name, checks[name], split)]
    findings += [finding for overlap in overlaps for finding in _judge_overlap(overlap)]
    return DataCheck(preferences=checks, overlaps=overlaps, findings=findings)


def _judge(name: str, check: PreferenceCheck, split: Split) -> list[Finding]:
    """Findings of one preference, by the thresholds at the top."""
    found: list[Finding] = []

    def share(part: int, whole: int, limits: tuple[float, float], text: str) -> None:
        level = next(
            (level for level, limit in zip(("error", "warning"), limits, strict=True) if part > limit * whole), None
        )
        if level is not None:
            found.append(Finding(level=level, preference=name, text=f"{name}: {part} of {whole} {text}"))  # type: ignore[arg-type]

    if check.unreadable:
        found.append(
            _error(name, f"{check.unreadable} of {check.rows} rows cannot be used; the first: {split.flaws[0]}")
        )
    reasons = "; ".join(f"{reason}: {count}" for reason, count in check.dropped.items())
    share(sum(check.dropped.values()), check.rows, DROPPED, f"rows say nothing and are left out ({reasons})")
    for what, count in (("to train on", check.pairs), ("held out", check.held_out)):
        if not count:
            found.append(_error(name, f"no pairs {what}; give more rows, a test file, or another test_fraction"))
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
        found.append(_warning(name, f"{check.held_out} pairs held out: accuracy is known to ±{error:.2f} only"))
    if max(check.chosen_longer, 1 - check.chosen_longer) > LONGER:
        side = "chosen" if check.chosen_longer > 0.5 else "rejected"
        part = max(check.chosen_longer, 1 - check.chosen_longer)
        found.append(
            _warning(
                name,
                f"the {side} answer is the longer one in {part:.0%} of the pairs; the vector may "
                "learn length: balance the pairs, or measure the length of answers in the evaluation",
            )
        )
    total = sum(check.labels.values())
    for place, count in check.labels.items():
        if count > PLACE * total:
            found.append(_warning(name, f"{place} is the chosen one in {count} of {total} rows; are the labels real?"))
    if check.lengths is not None and check.lengths.refused:
        lengths = check.lengths
        hint = "; or set system: fold to move them into the first user message" * (check.system_messages > 0)
        text = f"the base's chat template refuses {lengths.refused} of {min(check.pairs, SAMPLE)} pairs"
        found.append(_error(name, f"{text} ({lengths.refusal:.200}){hint}"))
    if check.lengths is not None and check.lengths.max_length is not None:
        lengths, limit = check.lengths, check.lengths.max_length
        share(lengths.left_out, lengths.sampled, LEFT_OUT, f"pairs are dropped: the prompt fills max_length {limit}")
        share(lengths.cut_equal, lengths.sampled, CUT_EQUAL, f"pairs have equal answers up to max_length {limit}")
        share(lengths.truncated, lengths.sampled, (1.0, TRUNCATED), f"pairs are cut at max_length {limit}; raise it")
    if check.lengths is not None and check.lengths.prompt_changes:
        found.append(
            _warning(
                name,
                f"{check.lengths.prompt_changes} of {check.lengths.sampled} prompts are tokenized "
                "otherwise when an answer follows; the last tokens of the prompt are left out of training",
            )
        )
    return found


def _judge_overlap(overlap: Overlap) -> list[Finding]:
    if overlap.shared < FEW_HELD_OUT or 0 < overlap.opposite < overlap.shared:
        return []
    how = (
        "the same way: both vectors will be the same"
        if not overlap.opposite
        else "oppositely: one vector is minus the other"
    )
    first, second = overlap.preferences
    return [_warning(first, f"orders all {overlap.shared} pairs that it shares with {second} {how}; check the labels")]


def _error(name: str, text: str) -> Finding:
    return Finding(level="error", preference=name, text=f"{name}: {text}")


def _warning(name: str, text: str) -> Finding:
    return Finding(level="warning", preference=name, text=f"{name}: {text}")

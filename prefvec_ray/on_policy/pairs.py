"""From several scored answers to a prompt to pairs, and what is known of the pairs. No model, no Ray."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.estimates import Estimate, estimate


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class ScoredAnswer(_Data):
    """One answer of the base."""

    text: str
    tokens: int
    """With its end token."""
    ended: bool
    """It came to its end, and was not cut off at `max_new_tokens`."""
    scores: dict[str, float | None]
    """By metric; None where the metric is not defined for it."""


@dataclass(frozen=True)
class RankedPair:
    """Two answers to one prompt. Gains are scores turned so that more is better."""

    chosen: ScoredAnswer
    rejected: ScoredAnswer
    chosen_gain: float
    rejected_gain: float


@dataclass(frozen=True)
class Ranking:
    """What became of the answers to one prompt."""

    pairs: list[RankedPair]
    cut_off: int
    unusable: int
    repeated: int
    unscored: int


def rank_answers(
    answers: Sequence[ScoredAnswer], name: str, metric: Metric, *, margin: float = 0.0, most: int = 1
) -> Ranking:
    """Up to `most` pairs of the answers to one prompt: the best with the worst, the next best with the next worst.

    In a pair the chosen answer is better in the metric `name` by more than `margin`. No answer is in two pairs. Left
    out are answers that were cut off (trained on, they would teach the model to stop anywhere), empty ones and those
    with a NUL character (training refuses both), those equal to an earlier one, and those without a score.
    """
    whole = [answer for answer in answers if answer.ended]
    usable = [answer for answer in whole if answer.text.strip() and "\0" not in answer.text]
    distinct = list({answer.text.strip(): answer for answer in reversed(usable)}.values())[::-1]
    scored = [(metric.gain(score, 0.0), answer) for answer in distinct if (score := answer.scores[name]) is not None]
    scored.sort(key=lambda found: found[0], reverse=True)
    pairs: list[RankedPair] = []
    for (high, chosen), (low, rejected) in zip(scored[:most], scored[::-1][:most], strict=True):
        if len(pairs) >= len(scored) // 2 or not high - low > margin:
            break
        pairs.append(RankedPair(chosen, rejected, high, low))
    return Ranking(
        pairs,
        cut_off=len(answers) - len(whole),
        unusable=len(whole) - len(usable),
        repeated=len(usable) - len(distinct),
        unscored=len(distinct) - len(scored),
    )


class Counts(_Data):
    """How many prompts and answers there were, and why some gave no pair."""

    prompts: int
    """Distinct ones that answers were generated to."""
    repeated_prompts: int
    """Left out: equal to an earlier one up to case, punctuation and spaces."""
    excluded_prompts: int
    """Left out: equal to a prompt of `exclude`."""
    answers: int
    cut_off: int
    unusable: int
    """Empty, or with a NUL character."""
    repeated: int
    unscored: int
    without_pair: int
    """Prompts of which no two answers were further apart than the margin."""
    pairs: int


class MadePairs(_Data):
    """`made.json`: where the pairs come from, and what is known of them."""

    preference: str
    base: str
    base_fingerprint: str
    prompts: str
    exclude: list[str]
    scorer: str | None
    """A digest of all that its scores depend on; None where it states none."""
    rank_by: str
    metric: Metric
    sampling: dict[str, Any]
    margin: float
    pairs_per_prompt: int
    counts: Counts
    gain: Estimate | None
    """How much better the chosen answers are, over the pairs; None without pairs."""
    longer_by: Estimate | None
    """Tokens that the chosen answers are longer by, over the pairs; negative where they are shorter."""
    chosen_longer: float | None
    """Share of the pairs whose chosen answer is the longer one, of those of unequal length; None without such pairs."""

    def warnings(self) -> list[str]:
        """What a reader should know before training on the pairs."""
        found = []
        if self.chosen_longer is not None and not 0.3 <= self.chosen_longer <= 0.7:
            which = "longer" if self.chosen_longer > 0.5 else "shorter"
            share = max(self.chosen_longer, 1 - self.chosen_longer)
            found.append(
                f"the chosen answer is the {which} one in {share:.0%} of the pairs: the vector may learn length; "
                "score length beside what it is for"
            )
        lost = self.counts.cut_off / max(1, self.counts.answers)
        if lost > 0.1:
            found.append(f"{lost:.0%} of the answers were cut off at max_new_tokens and left out; raise it")
        return found


def summarise(pairs: Sequence[RankedPair]) -> Mapping[str, Any]:
    """The fields `gain`, `longer_by` and `chosen_longer` of `MadePairs`."""
    longer = [pair.chosen.tokens - pair.rejected.tokens for pair in pairs]
    unequal = [float(tokens > 0) for tokens in longer if tokens]
    return {
        "gain": estimate([pair.chosen_gain - pair.rejected_gain for pair in pairs]),
        "longer_by": estimate([float(tokens) for tokens in longer]),
        "chosen_longer": statistics.fmean(unequal) if unequal else None,
    }

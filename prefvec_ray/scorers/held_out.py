"""What a reward model is worth on held-out pairs: accuracy beside chance and beside length alone, and calibration."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from prefvec_ray.common.estimates import Estimate, estimate

BINS = 5


class Bin(BaseModel):
    """Pairs of similar confidence: how sure the model was of its choice, and how often it was right."""

    model_config = ConfigDict(frozen=True)

    confidence: float
    accuracy: float
    pairs: int


class HeldOut(BaseModel):
    """What a reward model is worth on pairs of unseen prompts. Accuracies are means over prompts; chance is 0.5."""

    model_config = ConfigDict(frozen=True)

    accuracy: Estimate
    interval: tuple[float, float]
    """Of the accuracy: 95%, normal, over prompts."""
    longer: Estimate
    """The same pairs, decided by length alone; which way is learned on the training pairs."""
    gain_over_longer: Estimate | None
    """Accuracy above that of length alone, paired by prompt."""
    chosen_longer: Estimate | None
    """Accuracy on the pairs whose chosen answer is the longer one: where it is far above the next, the model
    measures length."""
    chosen_shorter: Estimate | None
    balanced: Estimate | None
    """The mean of these two, each counting half: what the model knows beyond length, whose own value is 0.5 here."""
    log_loss: float
    """Of P(chosen) = sigmoid(margin), in nats; chance is 0.693."""
    calibration_error: float
    """Mean distance of confidence and accuracy over `bins`, weighted by pairs."""
    bins: list[Bin]
    pairs: int


def held_out_report(
    margins: Sequence[float], prompts: Sequence[str], lengths: Sequence[tuple[int, int]], *, longer_wins: bool
) -> HeldOut:
    """What `margins` (reward of the chosen answer less that of the rejected one) show; a tie counts as half right.

    Args:
        prompts: of each pair; pairs of one prompt are not independent, so errors are over prompts.
        lengths: of each pair's chosen and rejected answer, in characters.
        longer_wins: the length-alone baseline chooses the longer answer, else the shorter one.
    """
    right = [_share(margin) for margin in margins]
    by_length = [_share((chosen - rejected) * (1 if longer_wins else -1)) for chosen, rejected in lengths]
    accuracy, longer = (_over(prompts, values) for values in (right, by_length))
    assert accuracy is not None
    assert longer is not None
    error = 1.96 * (accuracy.stderr or 0.0)
    sides = {
        side: _over(prompts, [r if (c - j) * side > 0 else None for r, (c, j) in zip(right, lengths, strict=True)])
        for side in (1, -1)
    }
    bins = _bins(margins)
    return HeldOut(
        accuracy=accuracy,
        interval=(max(0.0, accuracy.mean - error), min(1.0, accuracy.mean + error)),
        longer=longer,
        gain_over_longer=_over(prompts, [a - b for a, b in zip(right, by_length, strict=True)]),
        chosen_longer=sides[1],
        chosen_shorter=sides[-1],
        balanced=_halves(sides[1], sides[-1]),
        log_loss=sum(_softplus(-margin) for margin in margins) / len(margins),
        calibration_error=sum(b.pairs * abs(b.confidence - b.accuracy) for b in bins) / len(margins),
        bins=bins,
        pairs=len(margins),
    )


def _share(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _over(prompts: Sequence[str], values: Sequence[float | None]) -> Estimate | None:
    """Mean and error over prompts of each prompt's own mean."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None:
            grouped[prompt].append(value)
    return estimate([sum(group) / len(group) for group in grouped.values()])


def _halves(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    if a is None or b is None:
        return None
    error = math.hypot(a.stderr, b.stderr) / 2 if a.stderr is not None and b.stderr is not None else None
    return Estimate(mean=(a.mean + b.mean) / 2, stderr=error, n=a.n + b.n)


def _bins(margins: Sequence[float]) -> list[Bin]:
    """`BINS` groups of as many pairs each, from the least sure to the surest; equal margins in random order."""
    order = sorted(random.Random(0).sample(list(margins), len(margins)), key=abs)
    edges = [round(len(order) * i / BINS) for i in range(BINS + 1)]
    groups = [order[low:high] for low, high in itertools.pairwise(edges) if high > low]
    return [
        Bin(
            confidence=sum(math.exp(-_softplus(-abs(m))) for m in group) / len(group),
            accuracy=sum(map(_share, group)) / len(group),
            pairs=len(group),
        )
        for group in groups
    ]


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

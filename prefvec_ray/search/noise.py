"""Fronts whose points are measured with error. NumPy only.

Settings of one search are measured on the same prompts with the same random numbers, so two of them differ by far less
error than each has alone: everything here compares them in pairs, prompt by prompt.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.errors import InputError

if TYPE_CHECKING:
    from prefvec_ray.search.result import Goal

Array = NDArray[np.float64]
ERRORS = 2.0
"""How many paired standard errors a difference must exceed to be taken for one."""


class MeasuredSettings:
    """Settings measured on the same prompts, as arrays: S settings, O objectives, L limits, P prompts.

    Gains are larger where better; slack is how far a limit is kept. NaN where a metric is not defined.

    Raises:
        InputError: evaluations of other prompts or other sampling.
    """

    def __init__(self, goal: "Goal", evaluations: Sequence[Evaluation]) -> None:
        if len({e.prompts_digest for e in evaluations}) > 1:
            raise InputError("evaluations of other prompts or other sampling cannot share a front")
        columns = [*((name, 0.0) for name in goal.objectives), *goal.limits.items()]
        # Metrics of preference pairs have as many values as there are pairs: short columns are filled with NaN.
        width = max(len(e.per_prompt[name]) for e in evaluations for name, _ in columns)
        values = np.full((len(evaluations), len(columns), width), np.nan)
        for s, evaluation in enumerate(evaluations):
            for c, (name, over) in enumerate(columns):
                column = evaluation.per_prompt[name]
                gains = [np.nan if x is None else goal.metrics[name].gain(x, over) for x in column]
                values[s, c, : len(column)] = gains
        self.gains_SOP, self.slack_SLP = np.split(values, [len(goal.objectives)], axis=1)

    def front(self, errors: float = ERRORS) -> NDArray[np.bool_]:
        """Which settings no other one beats, where beating means: no worse in any objective, and better in one by more
        than `errors` paired standard errors. Only settings that keep the limits (by their means) count.

        A setting that is worse than another by less than the error of measuring is still on the front.
        """
        mean_SO, kept = _mean(self.gains_SOP), self.kept
        difference, error = _paired(self.gains_SOP, self.gains_SOP)
        no_worse = (mean_SO[:, None] >= mean_SO[None]).all(-1)
        beats = no_worse & (difference > errors * error).any(-1) & kept[:, None]
        return np.asarray(kept & ~beats.any(0))

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which settings keep every limit and define every objective."""
        return np.asarray((_mean(self.slack_SLP) >= 0).all(-1) & ~np.isnan(_mean(self.gains_SOP)).any(-1))

    def may_be_optimal(self, index: int, errors: float) -> bool:
        """Whether setting `index` may still reach the front: it does not break a limit, and no setting that keeps the
        limits is better in every objective, each by more than `errors` paired standard errors."""
        slack, slack_error = _mean(self.slack_SLP[index]), _error(self.slack_SLP[index])
        if (slack + errors * slack_error < 0).any():
            return False
        difference, error = _paired(self.gains_SOP, self.gains_SOP[[index]])
        better = (difference[:, 0] > errors * error[:, 0]).all(-1) & self.kept
        return not better.any()

    def resampled(self, resamples: int, seed: int = 0) -> tuple[Array, NDArray[np.bool_], NDArray[np.int64]]:
        """Bootstrap over prompts: means of the gains (B, S, O), which settings keep the limits (B, S), and how often
        each prompt was drawn (B, P).

        A resample without any of the prompts on which a metric is defined gives no value for a setting that keeps the
        limits, and is left out; where that leaves none, the prompts as they are stand for all.
        """
        prompts = self.gains_SOP.shape[-1]
        rng = np.random.default_rng(seed)
        counts_BP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
        values_SXP = np.concatenate([self.gains_SOP, self.slack_SLP], axis=1)[self.kept]
        says_B = ~np.isnan(_weighted(values_SXP, counts_BP)).any((1, 2))
        counts_BP = counts_BP[says_B] if says_B.any() else np.ones((1, prompts), np.int64)
        return *self.weighted(counts_BP), counts_BP

    def weighted(self, weights_BP: NDArray[np.int64]) -> tuple[Array, NDArray[np.bool_]]:
        """Means of the gains (B, S, O) and which settings keep the limits (B, S), with prompts weighted so."""
        mean_BSO = _weighted(self.gains_SOP, weights_BP)
        kept_BS = (_weighted(self.slack_SLP, weights_BP) >= 0).all(-1) & ~np.isnan(mean_BSO).any(-1)
        return mean_BSO, np.asarray(kept_BS)

    def front_probabilities(self, resamples: int = 200, seed: int = 0) -> Array:
        """How often each setting is on the plain front (of the means) of bootstrap resamples of the prompts: (S,)."""
        mean_BSO, kept_BS, _ = self.resampled(resamples, seed)
        on = [_plain_front(mean_SO, kept_S) for mean_SO, kept_S in zip(mean_BSO, kept_BS, strict=True)]
        return np.mean(on, axis=0)

    def gain_error(self, before: int, reference: Sequence[float], resamples: int = 100, seed: int = 0) -> float:
        """Standard error, over bootstrap resamples of the prompts, of the hypervolume that the settings from index
        `before` on add to that of the earlier ones; above `reference`.

        Volumes by Monte Carlo on 2,000 points, the same for every resample: cheap in any number of objectives.
        """
        mean_BSO, kept_BS, _ = self.resampled(resamples, seed)
        low, high = np.asarray(reference), np.nanmax(mean_BSO, axis=(0, 1))
        if not (high > low).all():
            return 0.0
        points_NO = low + (high - low) * np.random.default_rng(seed).random((2000, len(low)))
        added = []
        for mean_SO, kept_S in zip(mean_BSO, kept_BS, strict=True):
            covered = (points_NO[:, None] <= mean_SO[None]).all(-1) & kept_S
            added.append((covered[:, before:].any(-1) & ~covered[:, :before].any(-1)).mean())
        return float(np.std(added, ddof=1) * np.prod(high - low)) if len(added) > 1 else 0.0


def _weighted(values_SXP: Array, weights_BP: NDArray[np.int64]) -> Array:
    known = (~np.isnan(values_SXP)).astype(float)
    total = np.einsum("sxp,bp->bsx", np.nan_to_num(values_SXP), weights_BP.astype(float), optimize=True)
    weight = np.einsum("sxp,bp->bsx", known, weights_BP.astype(float), optimize=True)
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def _mean(values: Array) -> Array:
    known = ~np.isnan(values)
    count = known.sum(-1)
    total = np.where(known, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _error(values: Array) -> Array:
    """Standard error of the mean over the last axis; 0 where there are fewer than two values."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    squares = np.where(known, (values - _mean(values)[..., None]) ** 2, 0.0).sum(-1)
    return np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1)) * (count > 1)


def _paired(a_SOP: Array, b_TOP: Array) -> tuple[Array, Array]:
    """Mean and standard error of a - b over the prompts where both are defined: (S, T, O) each.

    With fewer than two such prompts the error is 0, as in `evaluation.compare_metric`.
    """
    # Centred first: the squares below would lose a small difference of large numbers.
    centre = np.nan_to_num(_mean(np.concatenate([a_SOP, b_TOP]).transpose(1, 0, 2).reshape(a_SOP.shape[1], -1)))
    a, b = a_SOP - centre[:, None], b_TOP - centre[:, None]
    a0, b0, ka, kb = np.nan_to_num(a), np.nan_to_num(b), ~np.isnan(a) * 1.0, ~np.isnan(b) * 1.0

    def over_prompts(x: Array, y: Array) -> Array:
        return np.einsum("sop,top->sto", x, y, optimize=True)

    count = over_prompts(ka, kb)
    total = over_prompts(a0, kb) - over_prompts(ka, b0)
    squares = over_prompts(a0**2, kb) - 2 * over_prompts(a0, b0) + over_prompts(ka, b0**2)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    spread = squares - count * np.nan_to_num(mean) ** 2
    spread[spread < 1e-12 * squares] = 0  # what rounding leaves of equal differences
    return mean, np.sqrt(spread / np.maximum(count - 1, 1) / np.maximum(count, 1))


def _plain_front(mean_SO: Array, kept_S: NDArray[np.bool_]) -> NDArray[np.bool_]:
    no_worse = (mean_SO[:, None] >= mean_SO[None]).all(-1)
    better = (mean_SO[:, None] > mean_SO[None]).any(-1)
    return np.asarray(kept_S & ~(no_worse & better & kept_S[:, None]).any(0))

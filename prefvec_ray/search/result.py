"""What a search found: every setting it measured, the Pareto front among them, and a recommendation. Plain
data."""

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from prefvec_ray.artifacts.evaluation import Evaluation, Metric, SearchSummary
from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import is_base
from prefvec_ray.search.noise import MeasuredSettings
from prefvec_ray.search.pareto import Point, hypervolume


class FailedTrial(BaseModel):
    """A setting that gave no numbers, and why."""

    model_config = ConfigDict(frozen=True)

    coefficients: dict[str, float]
    error: str

    def __str__(self) -> str:
        return f"failed at {self.coefficients}: {self.error}"


class Tried(BaseModel):
    """One setting's way up the rungs: what it scored after each rung that it was measured on."""

    model_config = ConfigDict(frozen=True)

    rungs: list[Evaluation]
    complete: bool
    """Whether it was measured to the end; else it was dropped after its last rung here."""
    answers: int
    """Answers generated for it."""
    order: int = -1
    """Its place among the proposals of its search; -1: not known."""
    process: str = ""
    """Node and pid that measured it."""
    began: float = 0.0
    ended: float = 0.0
    """Seconds since 1970, from the first rung's start to the last one's end."""

    @property
    def coefficients(self) -> dict[str, float]:
        return self.rungs[-1].coefficients


class Ended(BaseModel):
    """How a search ended, as its journal keeps it."""

    model_config = ConfigDict(frozen=True)

    stopped: str
    """Why, in words."""
    asked: dict[str, Any]
    """The plan and the limits that it ended under."""
    failed: list[FailedTrial] = []
    counted: int | None = None
    """So many settings, in the order of their proposals, belong to the result; None: all of them."""
    seconds: float = 0.0


class Recommendation(BaseModel):
    """One setting of the front, and the reason for it."""

    model_config = ConfigDict(frozen=True)

    coefficients: dict[str, float]
    reason: str
    optimism: dict[str, float] = {}
    """Objective -> by how much the chosen setting looks better on the prompts it was chosen on than on others, in the
    metric's own direction; estimated on the prompts that bootstrap resamples left out. Empty for few prompts."""


class Goal(BaseModel):
    """What a search is for: `objectives` by name, the `metrics` that say how to read them, and `limits` to
    keep.

    A limit is a floor for a metric that is maximized and a ceiling for one that is minimized. Those of `beside_base`
    are added to the base's mean, and are among `limits` once that is measured (`with_base`).
    """

    model_config = ConfigDict(frozen=True)

    objectives: tuple[str, ...]
    metrics: dict[str, Metric]
    limits: dict[str, float] = {}
    beside_base: dict[str, float] = {}

    def with_base(self, base: Evaluation) -> "Goal":
        """The goal with every limit as a number; InputError where a metric was not defined for the base."""
        # Rounded, so that 0.7 keeps a limit of 0.1 below 0.8.
        found = {name: round(base.mean(name) + offset, 12) for name, offset in self.beside_base.items()}
        return self.model_copy(update={"limits": self.limits | found})

    def limit_words(self, name: str) -> str:
        """`0.61 (base - 0.02)`."""
        offset = self.beside_base.get(name)
        beside = "" if offset is None else f" (base {'-' if offset < 0 else '+'} {abs(offset):g})"
        return f"{self.limits[name]:.4g}{beside}"

    def check(self) -> None:
        """InputError unless every objective and limit names a metric with a direction."""
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise InputError(f"objectives {list(self.objectives)}: give at least one, each once")
        for name in (*self.objectives, *self.limits, *self.beside_base):
            if name not in self.metrics:
                raise InputError(f"{name!r} is not a metric of this scorer; it has: {', '.join(self.metrics)}")
            if self.metrics[name].direction is None:
                raise InputError(f"metric {name!r} has no better direction, so it cannot be searched or limited")

    def point(self, evaluation: Evaluation) -> Point:
        """The objectives as gains: larger is better."""
        return tuple(self.metrics[name].gain(evaluation.mean(name), 0.0) for name in self.objectives)

    def keeps_limits(self, evaluation: Evaluation) -> bool:
        """By the means; a limit on a metric that was defined on no prompt is not known to be kept."""
        found = [(self.metrics[name], evaluation.metrics.get(name), limit) for name, limit in self.limits.items()]
        return all(value is not None and metric.gain(value.mean, limit) >= 0 for metric, value, limit in found)

    def constraints(self, evaluation: Evaluation) -> dict[str, float]:
        """By how much each limit is broken: at most 0 where it is kept, 1 where the metric was not defined. One beside
        a base that is not measured yet counts as kept."""
        values = {name: evaluation.metrics.get(name) for name in self.limits}
        return dict.fromkeys(self.beside_base, 0.0) | {
            name: 1.0 if value is None else -self.metrics[name].gain(value.mean, self.limits[name])
            for name, value in values.items()
        }

    def reference(self, base: Evaluation) -> Point:
        """Where the hypervolume begins: each objective's worst possible value, the base's where it has
        none."""
        found = []
        for name in self.objectives:
            worst = self.metrics[name].worst
            found.append(self.metrics[name].gain(base.mean(name) if worst is None else worst, 0.0))
        return tuple(found)


MIN_PROMPTS = 8
"""Below this many prompts a bootstrap over them is meaningless."""
RESAMPLES = 200


class SearchResult(BaseModel):
    """`trials` are the settings measured to the end, in the order they finished; the first one of all-zero
    coefficients is the base."""

    model_config = ConfigDict(frozen=True)

    goal: Goal
    trials: list[Evaluation]
    dropped: list[Evaluation] = []
    """Settings that a cheaper rung showed to be beaten, as that rung saw them."""
    failed: list[FailedTrial] = []
    answers: int = 0
    """Generated in all, dropped settings included; those that failed or were cancelled at the end are not counted."""
    spent: list[int] = []
    """How many of the answers had been generated when each of `trials` finished."""
    stopped: str = ""
    """Why the search ended, in words."""
    seconds: float = 0.0
    """Wall-clock of the last run that measured something, start-up included; an interrupted run's time is not in it."""
    resumed: int = 0
    """How many settings, measured or dropped, an earlier run had done."""

    @cached_property
    def base(self) -> Evaluation:
        if not self.has_base:
            raise InputError("the search has not measured the base (all coefficients 0); run the search again")
        return next(trial for trial in self.trials if is_base(trial.coefficients))

    @property
    def has_base(self) -> bool:
        return any(is_base(trial.coefficients) for trial in self.trials)

    @cached_property
    def _measured(self) -> MeasuredSettings:
        return MeasuredSettings(self.goal, self.trials)

    @cached_property
    def _front(self) -> list[int]:
        on = [i for i, is_on in enumerate(self._measured.front()) if is_on]
        return sorted(on, key=lambda i: self.goal.point(self.trials[i]))

    @property
    def front(self) -> list[Evaluation]:
        """The settings within the limits that no other one beats beyond the paired error (`MeasuredSettings.front`).
        They are sorted by the first objective."""
        return [self.trials[i] for i in self._front]

    @cached_property
    def front_probability(self) -> list[float]:
        """Of each setting of `front`: the share of bootstrap resamples of the prompts that have it on their front."""
        chances = self._measured.front_probabilities(RESAMPLES)
        return [float(chances[i]) for i in self._front]

    @property
    def hypervolume(self) -> float:
        return self.hypervolume_history[-1]

    @cached_property
    def hypervolume_history(self) -> list[float]:
        """The hypervolume after each trial."""
        reference, kept, volumes = self.goal.reference(self.base), list[Point](), list[float]()
        for trial in self.trials:
            if self.goal.keeps_limits(trial):
                kept.append(self.goal.point(trial))
            volumes.append(hypervolume(kept, reference))
        return [float(x) for x in np.maximum.accumulate(volumes)]  # a last bit is no loss

    @cached_property
    def recommended(self) -> Recommendation | None:
        """The front's compromise between the objectives; None where the front is empty.

        It is the setting whose least gain over the base is largest, each gain in units of the best gain that any
        setting has in that objective: the Kalai-Smorodinsky solution (Econometrica 43, 1975) with the base as what each
        objective falls back to. It needs no weights and does not change when an objective is rescaled.

        It is judged on bootstrap resamples of the prompts, and the setting that does best on average is taken: one that
        owes its place to a few lucky prompts loses it on the resamples without them. What is left of its luck is stated
        as `optimism`; confirm it on prompts that the search never saw.
        """
        if not self._front:
            return None
        table = self._measured
        base, front = self.trials.index(self.base), self._front
        mean_BSO, kept_BS, counts_BP = table.resampled(RESAMPLES)
        gains_BSO, kept_BS = mean_BSO[:, front] - mean_BSO[:, base, None], kept_BS[:, front]
        shares_BSO = _shares(gains_BSO)
        least_BS = shares_BSO.min(-1)
        # Where a resample breaks a limit, the setting is worth as little there as the worst of all.
        least_BS = np.where(kept_BS, least_BS, least_BS.min(-1, keepdims=True))
        merit = np.round(least_BS.mean(0), 12) + 1e-9 * shares_BSO.sum(-1).mean(0)
        place = int(merit.argmax())
        return Recommendation(
            coefficients=self.trials[front[place]].coefficients,
            reason=self._reason(self.trials[front[place]]),
            optimism=self._optimism(least_BS.argmax(-1), counts_BP) if counts_BP.shape[1] >= MIN_PROMPTS else {},
        )

    def notes(self) -> list[str]:
        """What happened, in plain lines: how it ended, what it took, what was dropped, what failed."""
        lines = [
            f"ended because {self.stopped}" if self.stopped else "not ended",
            f"{len(self.trials)} settings measured to the end, {len(self.dropped)} dropped early, "
            f"{self.answers} answers generated",
        ]
        return lines + [str(failed) for failed in self.failed]

    def _reason(self, trial: Evaluation) -> str:
        if is_base(trial.coefficients):
            return (
                f"stay with the base: judged over resamples of the prompts, none of the {len(self.front)} settings on "
                f"the front{self._limits()} is better in every objective"
            )
        base = np.array(self.goal.point(self.base))
        gains_SO = np.array([self.goal.point(t) for t in self.front]) - base
        gains = np.array(self.goal.point(trial)) - base
        best = gains_SO.max(0)
        parts = [
            f"{name} {self.base.mean(name):.3f} → {trial.mean(name):.3f} ({gain / top:.0%} of the best gain found)"
            if gain > 0
            else f"{name} {self.base.mean(name):.3f} → {trial.mean(name):.3f} (no gain over the base)"
            for name, gain, top in zip(self.goal.objectives, gains, best, strict=True)
        ]
        return (
            f"of the {len(self.front)} settings on the front{self._limits()}, it gives up least of what each "
            f"objective could gain over the base: {'; '.join(parts)}"
        )

    def _optimism(self, chosen_B: np.ndarray, counts_BP: np.ndarray) -> dict[str, float]:
        """Means of what each resample would have chosen, on the resample less on the prompts it left out."""
        inside, _ = self._measured.weighted(counts_BP)
        outside, _ = self._measured.weighted((counts_BP == 0).astype(np.int64))
        rows, chosen = np.arange(len(chosen_B)), np.array(self._front)[chosen_B]
        lost = np.nan_to_num(np.nanmean(inside[rows, chosen] - outside[rows, chosen], axis=0))
        return {name: max(0.0, float(x)) for name, x in zip(self.goal.objectives, lost, strict=True)}

    def summary(
        self, *, preset: str | None = None, confirmed: tuple[Evaluation, Evaluation] | None = None
    ) -> SearchSummary:
        """What the report shows; `confirmed` are the base and the recommended setting on the report prompts."""
        chosen = self.recommended
        return SearchSummary(
            objectives=list(self.goal.objectives),
            trials=self.trials,
            front=self.front,
            base=self.base,
            hypervolume_history=self.hypervolume_history,
            limits=self.goal.limits,
            failed=len(self.failed),
            dropped=len(self.dropped),
            front_probability=self.front_probability,
            spent=self.spent,
            notes=self.notes(),
            seconds=self.seconds,
            recommended=chosen.coefficients if chosen else None,
            reason=chosen.reason if chosen else "",
            preset=preset,
            confirmed=confirmed,
        )

    def _limits(self) -> str:
        words = [
            f"{name} {'at least' if self.goal.metrics[name].direction == 'maximize' else 'at most'} "
            f"{self.goal.limit_words(name)}"
            for name in self.goal.limits
        ]
        return f" with {' and '.join(words)}" if words else ""


def _shares(gains_BSO: np.ndarray) -> np.ndarray:
    """Gains in units of the best gain any setting has there; plain gains where none has one."""
    best = gains_BSO.max(axis=1, keepdims=True)
    return gains_BSO / np.where(best > 0, best, 1.0)

"""What a search found: every setting it measured, the Pareto front among them, and a recommendation. Plain
data."""

from collections.abc import Mapping
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation import Evaluation, Metric
from prefvec_ray.evaluation.results import SearchSummary
from prefvec_ray.search.pareto import Point, compromise, hypervolume, non_dominated


class FailedTrial(BaseModel):
    """A setting that gave no numbers, and why."""

    model_config = ConfigDict(frozen=True)

    coefficients: dict[str, float]
    error: str


class Recommendation(BaseModel):
    """One setting of the front, and the reason for it."""

    model_config = ConfigDict(frozen=True)

    coefficients: dict[str, float]
    reason: str


class Goal(BaseModel):
    """What a search is for: `objectives` by name, the `metrics` that say how to read them, and `limits` to
    keep.

    A limit is a floor for a metric that is maximized and a ceiling for one that is minimized.
    """

    model_config = ConfigDict(frozen=True)

    objectives: tuple[str, ...]
    metrics: dict[str, Metric]
    limits: dict[str, float] = {}

    def check(self) -> None:
        """InputError unless every objective and limit names a metric with a direction."""
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise InputError(f"objectives {list(self.objectives)}: give at least one, each once")
        for name in (*self.objectives, *self.limits):
            if name not in self.metrics:
                raise InputError(f"{name!r} is not a metric of this scorer; it has: {', '.join(self.metrics)}")
            if self.metrics[name].direction is None:
                raise InputError(f"metric {name!r} has no better direction, so it cannot be searched or limited")

    def point(self, evaluation: Evaluation) -> Point:
        """The objectives as gains: larger is better."""
        return tuple(self.metrics[name].gain(evaluation.mean(name), 0.0) for name in self.objectives)

    def keeps_limits(self, evaluation: Evaluation) -> bool:
        return all(self.metrics[name].gain(evaluation.mean(name), limit) >= 0 for name, limit in self.limits.items())

    def reference(self, base: Evaluation) -> Point:
        """Where the hypervolume begins: each objective's worst possible value, the base's where it has
        none."""
        found = []
        for name in self.objectives:
            worst = self.metrics[name].worst
            found.append(self.metrics[name].gain(base.mean(name) if worst is None else worst, 0.0))
        return tuple(found)


class SearchResult(BaseModel):
    """`trials` are all settings measured, in the order they finished; the first one of all-zero
    coefficients is the base."""

    model_config = ConfigDict(frozen=True)

    goal: Goal
    trials: list[Evaluation]
    failed: list[FailedTrial] = []
    seconds: float = 0.0
    """Wall-clock of the last run of the search, start-up included; an interrupted run's time is not in it."""
    resumed: int = 0
    """How many of the trials an earlier, interrupted run had measured."""

    @cached_property
    def base(self) -> Evaluation:
        for trial in self.trials:
            if not any(trial.coefficients.values()):
                return trial
        raise InputError("the search has not measured the base (all coefficients 0); run the search again")

    @cached_property
    def front(self) -> list[Evaluation]:
        """The settings within the limits that no other such setting beats, sorted by the first objective."""
        allowed = [trial for trial in self.trials if self.goal.keeps_limits(trial)]
        found = [allowed[i] for i in non_dominated([self.goal.point(trial) for trial in allowed])]
        return sorted(found, key=self.goal.point)

    @property
    def hypervolume(self) -> float:
        return hypervolume([self.goal.point(trial) for trial in self.front], self.goal.reference(self.base))

    @property
    def hypervolume_history(self) -> list[float]:
        """The hypervolume after each trial."""
        reference = self.goal.reference(self.base)
        allowed = [self.goal.keeps_limits(trial) for trial in self.trials]
        points = [self.goal.point(trial) for trial in self.trials]
        return [
            hypervolume([p for p, fine in zip(points[:n], allowed[:n], strict=True) if fine], reference)
            for n in range(1, len(points) + 1)
        ]

    @property
    def recommended(self) -> Recommendation | None:
        """The front's compromise between the objectives (see `pareto.compromise`); None where the front is
        empty.

        Chosen on the search prompts, where it looks better than it is: confirm it on prompts that the
        search never saw.
        """
        base = self.goal.point(self.base)
        points = [self.goal.point(trial) for trial in self.front]
        found = compromise(points, base)
        if found is None:
            return None
        index, shares = found
        trial = self.front[index]
        gains = [x - b for x, b in zip(points[index], base, strict=True)]
        parts = [
            f"{name} {self.base.mean(name):.3f} → {trial.mean(name):.3f} ({share:.0%} of the best gain found)"
            if gain > 0
            else f"{name} {self.base.mean(name):.3f} → {trial.mean(name):.3f} (no gain over the base)"
            for name, gain, share in zip(self.goal.objectives, gains, shares, strict=True)
        ]
        return Recommendation(
            coefficients=trial.coefficients,
            reason=f"of the {len(points)} settings on the front{self._limits()}, it gives up least of what each "
            f"objective could gain over the base: {'; '.join(parts)}",
        )

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
            seconds=self.seconds,
            recommended=chosen.coefficients if chosen else None,
            reason=chosen.reason if chosen else "",
            preset=preset,
            confirmed=confirmed,
        )

    def _limits(self) -> str:
        limits: Mapping[str, float] = self.goal.limits
        words = [
            f"{name} {'at least' if self.goal.metrics[name].direction == 'maximize' else 'at most'} {limit:g}"
            for name, limit in limits.items()
        ]
        return f" with {' and '.join(words)}" if words else ""

"""From measurements to figures: hypervolumes of fronts on the report prompts, and paired differences between methods.

All methods of one job answer the same report prompts with the same random numbers. So a difference between two methods
is taken on the same bootstrap resamples of the prompts for both, and within one base and DPO seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import moocore
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.artifacts.training import MIXED, RunResult
from prefvec_ray.comparison.methods import METHODS
from prefvec_ray.search import Goal, hypervolume
from prefvec_ray.search.noise import MeasuredSettings

if TYPE_CHECKING:
    from prefvec_ray.comparison.config import CompareConfig
    from prefvec_ray.comparison.run import Job

RESAMPLES = 400
ERRORS = 2.0
"""So many errors a difference must exceed to be called one."""

Key = tuple[str, int, str]
"""Run, DPO seed, method."""


@dataclass(frozen=True)
class Fronts:
    """What was measured of a cell: everything on the search prompts; base and chosen settings on the report prompts."""

    searched: list[Evaluation]
    base: Evaluation
    front: list[Evaluation]


class CellFigures(BaseModel):
    """One method on one seed of one job."""

    model_config = ConfigDict(frozen=True)

    run: str
    seed: int
    method: str
    hypervolume: float
    """Above the base, on the report prompts, of the chosen settings that keep the limits there."""
    stderr: float
    """Over bootstrap resamples of the report prompts."""
    settings: list[dict[str, float]]
    """The parameters of the chosen settings."""
    means: list[dict[str, float]]
    """Their objectives on the report prompts."""
    best: list[bool]
    """Which of them keep the limits there, and are beaten by none of the others."""
    base: dict[str, float]


class MethodFigures(BaseModel):
    """One method over all jobs and seeds."""

    model_config = ConfigDict(frozen=True)

    method: str
    title: str
    runs: float
    """DPO runs that it needs, for all preferences together."""
    steps: float
    """Of those runs together."""
    hypervolume: float
    difference: float
    """To the first method's, on average over jobs and seeds."""
    over_prompts: float
    """Standard error of the difference over the report prompts."""
    over_seeds: float | None
    """Standard error of the difference over jobs and seeds; None where there is one."""
    wins: int
    """Jobs and seeds in which it is above the first method."""

    @property
    def error(self) -> float:
        """Both errors together; as if they were independent, which is on the safe side."""
        return math.hypot(self.over_prompts, self.over_seeds or 0.0)

    @property
    def verdict(self) -> str:
        if abs(self.difference) <= ERRORS * self.error:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


class Comparison(BaseModel):
    """`comparison.json`."""

    model_config = ConfigDict(frozen=True)

    objectives: list[str]
    limits: dict[str, float]
    answers: int
    """Generated for the search of one method on one seed."""
    settings: int
    report_prompts: int
    report_samples_per_prompt: int
    methods: list[MethodFigures]
    cells: list[CellFigures]


def best_subset(goal: Goal, base: Evaluation, tried: Sequence[Evaluation], count: int) -> list[Evaluation]:
    """At most `count` settings that together have the largest hypervolume above the base, chosen one by one."""
    reference = goal.point(base)
    waiting = [e for e in tried if goal.keeps_limits(e) and e is not base]
    chosen: list[Evaluation] = []
    volume = 0.0
    while waiting and len(chosen) < count:
        points = [goal.point(e) for e in chosen]
        volumes = [hypervolume([*points, goal.point(e)], reference) for e in waiting]
        best = int(np.argmax(volumes))
        if volumes[best] <= volume:
            break
        volume = volumes[best]
        chosen.append(waiting.pop(best))
    return chosen


def compared(config: "CompareConfig", jobs: Sequence["Job"], found: Mapping[Key, Fronts]) -> Comparison:
    """All figures of a comparison."""
    by_name = {job.name: job for job in jobs}
    resampled = {key: _resampled(by_name[key[0]].goal, fronts) for key, fronts in found.items()}
    volumes = {key: _volume(by_name[key[0]].goal, fronts) for key, fronts in found.items()}
    cells = [
        _cell(key, by_name[key[0]].goal, fronts, volumes[key], float(resampled[key].std(ddof=1)))
        for key, fronts in found.items()
    ]
    first = jobs[0]
    return Comparison(
        objectives=list(first.goal.objectives),
        limits=first.goal.limits,
        answers=config.settings * len(first.prompts) * config.samples_per_prompt,
        settings=config.settings,
        report_prompts=len(first.report_prompts),
        report_samples_per_prompt=config.report_samples_per_prompt,
        methods=[_method(name, config.methods[0], jobs, volumes, resampled) for name in config.methods],
        cells=cells,
    )


def _method(
    name: str,
    first: str,
    jobs: Sequence["Job"],
    volumes: Mapping[Key, float],
    resampled: Mapping[Key, NDArray[np.float64]],
) -> MethodFigures:
    places = [(job.name, seed) for job in jobs for seed in job.run.seeds]
    gains = [volumes[*place, name] - volumes[*place, first] for place in places]
    # Seeds of one job share its prompts, and so its resamples; jobs have prompts of their own.
    variances = []
    for job in jobs:
        gains_SB = [resampled[job.name, seed, name] - resampled[job.name, seed, first] for seed in job.run.seeds]
        variances.append(len(job.run.seeds) ** 2 * np.mean(gains_SB, axis=0).var(ddof=1))
    costs = [_cost(name, job, seed) for job in jobs for seed in job.run.seeds]
    return MethodFigures(
        method=name,
        title=METHODS[name].title,
        runs=float(np.mean([len(runs) for runs in costs])),
        steps=float(np.mean([sum(run.steps for run in runs) for runs in costs])),
        hypervolume=float(np.mean([volumes[*place, name] for place in places])),
        difference=float(np.mean(gains)),
        over_prompts=math.sqrt(sum(variances)) / len(places),
        over_seeds=float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None,
        wins=sum(gain > 0 for gain in gains),
    )


def _cost(name: str, job: "Job", seed: int) -> list[RunResult]:
    """The runs that a method needs of one seed."""
    trains = METHODS[name].trains
    return [
        run
        for run in job.run.summary.runs
        if run.spec.seed == seed and (run.spec.polarity in trains if run.spec.preference != MIXED else not trains)
    ]


def _volume(goal: Goal, fronts: Fronts) -> float:
    points = [goal.point(e) for e in fronts.front if goal.keeps_limits(e)]
    return hypervolume(points, goal.point(fronts.base)) if points else 0.0


def _resampled(goal: Goal, fronts: Fronts) -> NDArray[np.float64]:
    """The hypervolume on bootstrap resamples of the prompts: (B,), the same resamples for equally many prompts."""
    table = MeasuredSettings(goal, [fronts.base, *fronts.front])
    prompts = table.gains_SOP.shape[-1]
    weights_BP = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    mean_BSO, kept_BS = table.weighted(weights_BP)
    volumes = []
    for mean_SO, kept_S in zip(mean_BSO, kept_BS, strict=True):
        points = [tuple(mean_O) for mean_O, kept in zip(mean_SO[1:], kept_S[1:], strict=True) if kept]
        volumes.append(hypervolume(points, tuple(mean_SO[0])) if points else 0.0)
    return np.array(volumes)


def _cell(key: Key, goal: Goal, fronts: Fronts, volume: float, stderr: float) -> CellFigures:
    run, seed, method = key
    points_SO = np.array([goal.point(e) for e in fronts.front]).reshape(-1, len(goal.objectives))
    kept = np.array([goal.keeps_limits(e) for e in fronts.front], dtype=bool)
    best = kept.copy()
    best[kept] = moocore.is_nondominated(points_SO[kept], maximise=True) if kept.any() else False
    return CellFigures(
        run=run,
        seed=seed,
        method=method,
        hypervolume=volume,
        stderr=stderr,
        settings=[e.coefficients for e in fronts.front],
        means=[{name: e.mean(name) for name in goal.objectives} for e in fronts.front],
        best=best.tolist(),
        base={name: fronts.base.mean(name) for name in goal.objectives},
    )

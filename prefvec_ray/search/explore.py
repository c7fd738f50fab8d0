"""The decisions of a search, apart from what carries them out: which setting next, which to drop, when to stop.

    config = SearchConfig(objectives=["helpful", "harmless"], trials=40)
    explorer = Explorer(config, scorer.metrics, vectors=["helpful", "harmless"], rungs=[32, 128])
    while not explorer.ended:
        proposal = explorer.propose()
        ...                                    # measure it, rung by rung, while explorer.promising(...)
        explorer.finish(proposal, tried)

No Ray and no model here. `run.py` carries it out on Ray Tune with many settings in flight, the benchmark in a loop.

A search ends in one of two ways. Its budget is used up (trials, answers, seconds, grid): settings in flight are still
measured and count. Or what was measured decides it (the front stands still, most settings fail): it is `closed` at that
setting, and what finishes later counts for nothing.
"""

import itertools
import math
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
import torch

from prefvec_ray.artifacts.evaluation import Evaluation, Metric
from prefvec_ray.evaluation import is_base
from prefvec_ray.search.noise import MeasuredSettings
from prefvec_ray.search.options import SearchConfig
from prefvec_ray.search.pareto import Point
from prefvec_ray.search.result import Ended, FailedTrial, Goal, SearchResult, Tried
from prefvec_ray.search.space import Space
from prefvec_ray.search.surrogate import rank_candidates

GP_OBJECTIVES = 4
DECIDES = {"trials", "sampler", "answers", "seconds", "patience", "caution", "grid_steps", "limits"}
"""The options that decide when a search ends, beside `start`."""
ROUNDING = 1e-9
"""A share of the hypervolume below which a gain is a processor's rounding."""
MANY = 4
"""So many settings must have been tried before most of them can be said to fail."""


@dataclass(frozen=True)
class Proposal:
    """A setting to measure."""

    number: int
    coefficients: dict[str, float]


@dataclass
class Explorer:
    """Proposes settings, decides which are worth measuring on, and when to end."""

    config: SearchConfig
    metrics: Mapping[str, Metric]
    vectors: Iterable[str]
    rungs: Sequence[int]
    """The answers that each rung adds."""
    clock: Callable[[], float] = time.monotonic
    known: Sequence[Tried] = ()
    """What an earlier run of the same search has tried."""
    end: Ended | None = None
    """How the earlier run ended. Asked for the same again, the search has ended in the same way; asked for anything
    else (more trials, another limit), it decides anew from `known`."""
    goal: Goal = field(init=False)
    tried: list[Tried] = field(init=False, default_factory=list)
    failed: list[FailedTrial] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.goal, self.bounds = config.goal(self.metrics), config.bounds(self.vectors)
        config.check(self.bounds, sum(self.rungs))
        ended = self.end is not None and self.end.asked == self._asked()
        if ended and self.end is not None:
            self.known = self.known[: self.end.counted]
        self._began, self._ended, self._failing = self.clock(), "", False
        few = len(self.goal.objectives) <= GP_OBJECTIVES
        self.sampler = config.sampler if config.sampler != "auto" else "gp" if few else "tpe"
        self.space = Space(self.bounds, config.seed)
        self._open: dict[int, tuple[optuna.Trial | int, dict[str, float]]] = {}
        """By the number of the proposal: its trial in the study, by number where its sampler did not propose it."""
        self._proposed = len(self.known)
        self._numbers = itertools.count()
        self._distributions = {n: optuna.distributions.FloatDistribution(*b) for n, b in self.bounds.items()}
        modes = [self.goal.metrics[name].direction for name in self.goal.objectives]
        with quiet():
            self._study = optuna.create_study(directions=modes, sampler=self._sampler())
        for tried in self.known:
            self._measure_limits(tried)
        for tried in self.known:
            self._place(tried.coefficients, tried)
            self.tried.append(tried)
        self._queue = deque(self._first([tried.coefficients for tried in self.known]))
        if ended and self.end is not None:
            self._ended, self.failed = self.end.stopped, list(self.end.failed)
        self._stop_if_still()

    @property
    def ended(self) -> str:
        """Why no further setting will be proposed; empty while more may come."""
        if self._ended:
            return self._ended
        if self._proposed >= self.config.trials:
            return f"all {self.config.trials} settings were tried"
        if self.sampler == "grid" and not self._queue:
            return "every point of the grid was tried"
        if self.config.seconds is not None and self.clock() - self._began >= self.config.seconds:
            return f"the {self.config.seconds:g} seconds are over"
        if not self._open and not self._affordable():
            return f"the budget of {self.config.answers} answers does not cover another setting"
        return ""

    @property
    def closed(self) -> bool:
        """Whether what was measured has ended the search: what is still in flight does not count any more."""
        return bool(self._ended)

    def final(self, seconds: float = 0.0) -> Ended | None:
        """How the search ended, for its journal, and `closed` from now on; `seconds` it took.

        None where it has not ended, where settings are in flight, or where failures ended it: it may be tried again.
        """
        if not self.ended or self._failing or (self._open and not self.closed):
            return None
        self._ended = self.ended
        counted = len(self.tried)
        return Ended(stopped=self.ended, asked=self._asked(), failed=self.failed, counted=counted, seconds=seconds)

    def _asked(self) -> dict[str, Any]:
        """What decides when the search ends, as JSON; ranges and seed belong to every measurement."""
        return {**self.config.model_dump(mode="json", include=DECIDES), "start": self.config.first(self.bounds)[1:]}

    @property
    def answers(self) -> int:
        """Generated so far for the settings that were measured or dropped."""
        return sum(tried.answers for tried in self.tried)

    def propose(self) -> Proposal | None:
        """The next setting; None where there is none now: the search has `ended`, or waits for those in flight."""
        if self.ended or not self._affordable():
            return None
        with quiet():
            trial, point = self._ask()
        number = next(self._numbers)
        self._open[number] = trial, point
        self._proposed += 1
        return Proposal(number, {name: float(point[name]) for name in self.bounds})

    def _ask(self) -> tuple[optuna.Trial | int, dict[str, float]]:
        """The next setting, and the study's trial of it, which tells its sampler that it is under way. It is like none
        that was measured, failed, or is in flight: where a sampler proposes one that is, `Space.between` decides."""
        if self._queue:
            point = self._queue.popleft()
            return self._place(point), point
        known = [tried.coefficients for tried in self.tried]
        known += [failed.coefficients for failed in self.failed]
        known += [underway for _, underway in self._open.values()]
        best = self._best_expected(known) if self.sampler == "gp" else None
        if best is not None:
            return self._place(best), best
        trial = self._study.ask(self._distributions)
        point = self.space.rounded(trial.params)
        if not self.space.near(point, known):
            return trial, point
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        point = self.space.between(self._front(), known)
        return self._place(point), point

    def _best_expected(self, known: Sequence[dict[str, float]]) -> dict[str, float] | None:
        """The setting unlike any of `known` that is expected to enlarge the front most; None before enough is
        measured."""
        base = next((tried for tried in self.tried if tried.complete and is_base(tried.coefficients)), None)
        if base is None or len(self.tried) < startup(len(self.bounds)):
            return None
        last = [tried.rungs[-1] for tried in self.tried]
        ranked_CD = rank_candidates(
            self.space.units([tried.coefficients for tried in self.tried]),
            np.array([self.goal.point(evaluation) for evaluation in last]),
            -np.array([list(self.goal.constraints(evaluation).values()) for evaluation in last]),
            self.space.units([underway for _, underway in self._open.values()]),
            self.goal.reference(base.rungs[-1]),
            seed=random.Random(f"{self.config.seed}/{self._proposed}").getrandbits(31),
        )
        points = (self.space.at(units_D) for units_D in ranked_CD)
        return next((point for point in points if not self.space.near(point, known)), None)

    def _place(self, point: dict[str, float], tried: Tried | None = None) -> int:
        """A trial of the study that its sampler did not propose, under way or with what it scored; its number."""
        measured: dict[str, Any] = {"state": optuna.trial.TrialState.RUNNING}
        if tried is not None:
            measured = {
                "values": self._values(tried),
                "constraints": self.goal.constraints(tried.rungs[-1]),
            }
        self._study.add_trial(optuna.trial.create_trial(params=point, distributions=self._distributions, **measured))
        return len(self._study.trials) - 1

    def _front(self) -> list[tuple[dict[str, float], Point]]:
        """The settings on the front so far, each with its gains."""
        complete = [tried for tried in self.tried if tried.complete]
        if not complete:
            return []
        on = MeasuredSettings(self.goal, [tried.rungs[-1] for tried in complete]).front()
        return [
            (tried.coefficients, self.goal.point(tried.rungs[-1]))
            for tried, is_on in zip(complete, on, strict=True)
            if is_on
        ]

    def _record(self, trial: optuna.Trial | int, tried: Tried) -> None:
        if isinstance(trial, int):
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self._place(tried.coefficients, tried)
            return
        for name, broken in self.goal.constraints(tried.rungs[-1]).items():
            trial.set_constraint(name, broken)
        self._study.tell(trial, self._values(tried))

    def promising(self, rungs: Sequence[Evaluation], *, among: int | None = None) -> bool:
        """Whether a setting that scored so on its way up may still reach the front, given the errors. The base may.

        Args:
            among: compare with the first so many of `tried`; None: with all.
        """
        if len(rungs) == len(self.rungs) or is_base(rungs[-1].coefficients):
            return True
        seen = [tried.rungs[len(rungs) - 1] for tried in self.tried[:among] if len(tried.rungs) >= len(rungs)]
        return MeasuredSettings(self.goal, [*seen, rungs[-1]]).may_be_optimal(-1, self.config.caution)

    def finish(self, number: int, tried: Tried) -> bool:
        """Take in a setting that was measured or dropped.

        False where it does not count: it has no number for an objective and so failed, or the search is `closed`.
        """
        if self.closed:
            self._cancel(number)
            return False
        flaw = self.flaw(tried)
        if flaw:
            self.fail(number, tried.coefficients, flaw)
            return False
        self._measure_limits(tried)
        with quiet():
            self._record(self._open.pop(number)[0], tried)
        self.tried.append(tried)
        self._stop_if_still()
        return True

    def _measure_limits(self, tried: Tried) -> None:
        """Where this is the base: the limits beside it are known now."""
        if tried.complete and is_base(tried.coefficients):
            self.goal = self.goal.with_base(tried.rungs[-1])

    def flaw(self, tried: Tried) -> str:
        """Why a measured setting cannot be compared with others; empty where it can."""
        for name in (*self.goal.objectives, *self.goal.limits, *self.goal.beside_base):
            estimate = tried.rungs[-1].metrics.get(name)
            if estimate is not None and not math.isfinite(estimate.mean):
                return f"{name!r} is {estimate.mean}"
            if estimate is None and name in self.goal.objectives:
                return f"objective {name!r} was defined on none of the prompts"
            if estimate is None and name in self.goal.beside_base and is_base(tried.coefficients):
                return f"{name!r}, which is limited beside the base's, was defined on none of the prompts"
        return ""

    def fail(self, number: int, coefficients: dict[str, float], error: str) -> None:
        """A setting that gave no result. The base is tried once more; without it the search ends."""
        self._cancel(number)
        if self.closed:
            return
        self.failed.append(FailedTrial(coefficients=coefficients, error=error))
        attempts = len(self.tried) + len(self.failed)
        if is_base(coefficients):
            again = sum(is_base(failed.coefficients) for failed in self.failed)
            if again > 1:
                self.give_up(f"the base itself could not be measured: {error}")
            else:
                self._queue.appendleft(coefficients)
                self._proposed -= 1
        elif attempts >= MANY and 2 * len(self.failed) > attempts:
            self.give_up(f"most settings fail, {len(self.failed)} of {attempts}; the last one with: {error}")

    def give_up(self, reason: str) -> None:
        """End the search for a failure. The journal does not keep that: opened again, the search is resumed."""
        if not self.closed:
            self._ended, self._failing = reason, True

    def _cancel(self, number: int) -> None:
        with quiet():
            self._study.tell(self._open.pop(number)[0], state=optuna.trial.TrialState.FAIL)

    def result(self, **more: Any) -> SearchResult:
        """What is known so far."""
        complete = [tried for tried in self.tried if tried.complete]
        spent = itertools.accumulate(tried.answers for tried in self.tried)
        return SearchResult(
            goal=self.goal,
            trials=[tried.rungs[-1] for tried in complete],
            dropped=[tried.rungs[-1] for tried in self.tried if not tried.complete],
            failed=self.failed,
            answers=self.answers,
            spent=[count for count, tried in zip(spent, self.tried, strict=True) if tried.complete],
            stopped=self.ended,
            **more,
        )

    def _affordable(self) -> bool:
        if self.config.answers is None:
            return True
        return self.answers + (len(self._open) + 1) * sum(self.rungs) <= self.config.answers

    def _values(self, tried: Tried) -> list[float]:
        return [tried.rungs[-1].mean(name) for name in self.goal.objectives]

    def _stop_if_still(self) -> None:
        patience = self.config.patience
        if patience is None or self._ended or self.sampler == "grid" or len(self.tried) < 2 * patience:
            return
        result = self.result()
        before = sum(tried.complete for tried in self.tried[:-patience])
        if not before or not result.has_base:
            return
        history = result.hypervolume_history
        gain = history[-1] - history[before - 1]
        if gain <= ROUNDING * history[-1]:
            gain = 0.0
        table = MeasuredSettings(self.goal, result.trials)
        error = table.gain_error(before, self.goal.reference(result.base)) if gain > 0 else 0.0
        if gain <= error:
            added = f"{gain:.4f} ± {error:.4f}" if gain else "nothing"
            self._ended = f"the front has stopped moving: the last {patience} settings added {added} to its hypervolume"

    def _first(self, done: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        """The settings that are tried whatever comes out, less those that are `done`: the base, the caller's, and the
        sampler's own beginning."""
        bounds = self.bounds
        points = self.config.first(bounds)
        if self.sampler == "grid":
            steps = self.config.grid_steps - 1
            axes = [[low + (high - low) * i / steps for i in range(steps + 1)] for low, high in bounds.values()]
            points += [dict(zip(bounds, values, strict=True)) for values in itertools.product(*axes)]
        elif self.sampler in ("tpe", "gp"):
            spread = [self.space.rounded(point) for point in self.space.spread(startup(len(bounds)))]
            points += [point for point in spread if not self.space.near(point, [*points, *done])]
        return [point for i, point in enumerate(points) if point not in points[:i] and point not in done]

    def _sampler(self) -> optuna.samplers.BaseSampler:
        seed, first = self.config.seed + len(self.known), startup(len(self.bounds))
        if self.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=first)
        if self.sampler == "nsga2":
            # A few dozen settings are several generations only if a generation is small.
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, self.config.trials // 4)))
        return optuna.samplers.RandomSampler(seed=seed)


def startup(dimensions: int) -> int:
    """How many evenly spread settings a model-based sampler begins with."""
    return 2 + 2 * dimensions


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's log lines and its warnings about experimental samplers, and with one torch thread: the Gaussian
    processes are so small that more threads only wait for each other."""
    verbosity, threads = optuna.logging.get_verbosity(), torch.get_num_threads()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)

"""A search over coefficients on Ray Tune: an `Explorer` decides, trial actors measure, a file keeps what is known.

Every finished setting is a line of `trials.jsonl`, written before the next one is proposed. A search that was killed,
at any moment and in any way, goes on from those lines when it is called again with the same folder: plain data, where
Tune's own snapshots are pickles that come every few seconds and hold one trial more or less than was paid for. How a
search ended is the last line, so that it ends in the same way, with the same result, when it is opened again.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from blake3 import blake3
from pydantic_core import to_json
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from rich.console import Console

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.scheduling import Waiting, bundle_of, check_room
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.scorers.base import scorer_digest
from prefvec_ray.search.explore import Explorer, Plan, Sampler
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.ordered import Ordered
from prefvec_ray.search.result import FailedTrial, Goal, SearchResult, Tried
from prefvec_ray.search.trial import DEATHS, Task, Trial

FULL_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class Progress:
    """Where a running search stands, after each setting that was measured, dropped or failed."""

    done: int
    trials: int
    dropped: int
    failed: int
    answers: int
    front: int
    hypervolume: float
    seconds: float
    failure: FailedTrial | None = None
    """The setting that has just failed, and why; None where one was measured or dropped."""

    def __str__(self) -> str:
        dropped = f", {self.dropped} of them dropped early" if self.dropped else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"search: {self.done}/{self.trials} settings{dropped}{failed}, {self.answers} answers, "
            f"{self.front} on the front, hypervolume {self.hypervolume:.4f}, {self.seconds:.0f} s"
            + (f"; {self.failure}" if self.failure else "")
        )


def show_progress(console: Console, bar: Callable[[int, int], None]) -> Callable[[Progress], None]:
    """What `search` is to call: a failing setting is printed at once, and only measured and dropped ones move the bar.

    Args:
        bar: called with (done, total), as `progress_bar` gives it.
    """

    def show(now: Progress) -> None:
        if now.failure:
            console.print(str(now.failure), style="red", markup=False, highlight=False, soft_wrap=True)
        bar(now.done, now.trials)

    return show


def search(
    task: Task,
    objectives: Sequence[str],
    folder: str | Path,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    limits: Mapping[str, float] | None = None,
    start: Sequence[Mapping[str, float]] = (),
    trials: int = 40,
    answers: int | None = None,
    seconds: float | None = None,
    patience: int | None = 16,
    sampler: Sampler = "auto",
    grid_steps: int = 5,
    caution: float = 1.0,
    timeout: float = 3600.0,
    actors: int = 4,
    seed: int = 0,
    resources: Mapping[str, float] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search the coefficients of `task.vectors` for the Pareto front of `objectives`, metrics of the task's scorer.

    The base and the settings in `start` come first, then what Optuna's `sampler` proposes within `ranges` (default
    [-1, 1]), or a grid of `grid_steps` an axis, on `actors` processes at once, each with `resources` (default one
    CPU). Each setting is measured rung by rung (`task.rungs`), and dropped where another is better in every objective
    by more than `caution` paired standard errors. Settings that break a limit are kept but never enter the front, and
    the sampler is told by how much they do. `SearchResult.stopped` says which of these ended the search:

    - `trials` settings were tried, dropped and failed ones included;
    - `answers` were generated, or `seconds` have passed;
    - the last `patience` settings raised the hypervolume by less than its standard error;
    - most settings fail. A setting fails where the scorer raises, or scores NaN, where a rung takes longer than
      `timeout` seconds (its process is killed), or where its process dies more than twice; it is listed in `failed`.

    Where what was measured ends the search (patience, failures), settings in flight are cancelled and count for
    nothing. Otherwise they are measured to the end.

    `folder` keeps the trials and how the search ended. A search that was interrupted goes on. One that ended returns
    the same result at once, unless it is asked for something else (more trials, another patience, other limits): then
    it decides anew from what was measured, and goes on or not. One that failures ended is tried again.
    The same seed and number of `actors` give the same search, however many of them the cluster has room for and
    whichever finishes first (`Ordered`); one that was interrupted may propose other settings after that. An active Ray
    connection is used, else Ray is started.

    Raises:
        InputError: a vector of another base, an unknown objective, limit or sampler, a range that does not contain 0,
            or a folder that holds another search.
        JobError: another process is searching into the folder; a trial process cannot be set up (a node does not see
            the base, the scorer cannot be built); nothing could be measured, or not the base, with the reason.
    """
    began = time.perf_counter()
    goal = Goal(objectives=tuple(objectives), metrics=task.metrics, limits=dict(limits or {}))
    goal.check()
    bounds = _ranges(task, ranges)
    plan = Plan(
        bounds,
        trials=trials,
        start=[_within(point, bounds) for point in start],
        sampler=sampler,
        answers=answers,
        seconds=seconds,
        patience=patience,
        caution=caution,
        grid_steps=grid_steps,
        seed=seed,
    )
    plan.check()
    rungs = [sum(block.answers for block in blocks) for blocks in task.blocks()]
    if answers is not None and answers < sum(rungs):
        raise InputError(f"a budget of {answers} answers; one setting alone takes {sum(rungs)}")
    if actors < 1 or not timeout > 0:
        raise InputError(f"{actors} actors with {timeout:g} s a rung; give at least one actor, and some time")
    task = replace(
        task,
        base=Path(task.base).absolute(),
        vectors={name: Path(vector).absolute() for name, vector in task.vectors.items()},
        base_fingerprint=check_vectors(task),
    )
    with Journal(Path(folder), _definition(task, goal, bounds, seed)) as journal:
        explorer = Explorer(goal, plan, rungs, known=journal.done, end=journal.end)
        end = explorer.final(journal.end.seconds if journal.end else 0.0)
        if end is None:
            _tune(task, explorer, journal, actors, timeout, dict(resources or {"cpu": 1}), progress, began)
            end = explorer.final(time.perf_counter() - began)
            if end is not None:
                journal.close_with(end)
    seconds = end.seconds if end else time.perf_counter() - began
    result = explorer.result(seconds=seconds, resumed=len(journal.done))
    if not result.has_base:
        first = f"; the first failure: {result.failed[0].error}" if result.failed else ""
        raise JobError(f"the search gave no result: {result.stopped}{first}")
    return result


class _Proposer(Searcher):
    """The explorer's proposals as Tune asks for them."""

    def __init__(self, ordered: Ordered) -> None:
        super().__init__()
        self.ordered = ordered

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self.ordered.propose()
        if proposal is None and self.ordered.explorer.ended:
            return Searcher.FINISHED
        return None if proposal is None else {"number": proposal.number, "coefficients": proposal.coefficients}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the conductor reports to the explorer."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a search goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its journal")


class _Halving(FIFOScheduler):
    """Stops a trial at a rung where its setting has lost."""

    def __init__(self, conductor: "_Conductor") -> None:
        super().__init__()
        self.conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        # Tune asks before it tells its callbacks, and does not ask after a result that is the last.
        seen = [*self.conductor.rungs_before(trial, result), Evaluation.model_validate_json(result["evaluation"])]
        promising = self.conductor.ordered.promising(trial.config["number"], seen)
        return self.CONTINUE if promising else self.STOP


class _Conductor(tune.Callback, tune.Stopper):
    """Takes in what trials report: into the explorer and the journal. Kills what hangs, and cancels what is in flight
    when the explorer is closed."""

    def __init__(
        self,
        ordered: Ordered,
        journal: Journal,
        timeout: float,
        progress: Callable[[Progress], None] | None,
        began: float,
        wait: Waiting,
    ) -> None:
        self.ordered, self.explorer, self.journal, self.wait = ordered, ordered.explorer, journal, wait
        self.timeout, self.progress, self.began = timeout, progress, began
        self._rungs: dict[str, list[Evaluation]] = {}
        self._began: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._killed: set[str] = set()
        self.unfit = ""
        """Why a trial process could not be set up."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune snapshots its callbacks. Nothing ever restores this one, and a caller's progress bar cannot be
        pickled."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Conductor":
        return self

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial ends here: that is `_Halving`'s to say."""
        return False

    def stop_all(self) -> bool:
        return self.explorer.closed

    def rungs_before(self, trial: TuneTrial, result: dict[str, Any]) -> list[Evaluation]:
        """What the trial scored before this result. A trial whose process died begins again at the first rung."""
        return self._rungs.get(trial.trial_id, [])[: result["rung"] - 1]

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._since[trial.trial_id] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        self._since[trial.trial_id] = time.monotonic()
        if self.explorer.closed:
            return
        if result.get("unfit"):
            self.unfit = self.unfit or result["error"]
            self.explorer.give_up(self.unfit)
            return
        if "error" in result:
            self._failed(trial, result["error"])
            return
        rungs = [*self.rungs_before(trial, result), Evaluation.model_validate_json(result["evaluation"])]
        self._rungs[trial.trial_id] = rungs
        if len(rungs) == 1:
            self._began[trial.trial_id] = result["began"]
        if not result.get("done"):
            return
        del self._rungs[trial.trial_id]
        # Samples of the last rung are kept; those before it are the same.
        earlier = [evaluation.model_copy(update={"samples": []}) for evaluation in rungs[:-1]]
        costs = self.explorer.rungs
        number = trial.config["number"]
        tried = Tried(
            order=self.ordered.order(number),
            rungs=[*earlier, rungs[-1]],
            complete=len(rungs) == len(costs),
            answers=sum(costs[: len(rungs)]),
            process=result["process"],
            began=self._began.pop(trial.trial_id),
            ended=result["ended"],
        )
        flaw = self.explorer.flaw(tried)
        if flaw:
            self._failed(trial, flaw)
            return
        self.journal.add(tried)
        self.ordered.finish(number, tried)
        self._report()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self.explorer.closed:
            return
        if trial.trial_id in self._killed:
            self._failed(trial, f"no result within {self.timeout:g} s of a rung; its process was killed")
            return
        # The traceback's last line names the exception; the file lies beside the driver and is plain text.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line for line in text.splitlines() if line.strip()]
        self._failed(trial, f"its process died {1 + DEATHS} times; {lines[-1].strip() if lines else 'no reason given'}")

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Tune's loop comes by several times a second: the place to look for trials that hang."""
        now = time.monotonic()
        self.wait.poll(started=any(trial.status == TuneTrial.RUNNING for trial in trials))
        for trial in trials:
            actor = trial.temporary_state.ray_actor
            if trial.status != TuneTrial.RUNNING or actor is None or trial.trial_id in self._killed:
                continue
            if now - self._since.get(trial.trial_id, now) > self.timeout:
                self._killed.add(trial.trial_id)
                trial.max_failures = 0  # a hang would only hang again
                ray.kill(actor)

    def _failed(self, trial: TuneTrial, error: str) -> None:
        self._rungs.pop(trial.trial_id, None)
        failure = FailedTrial(coefficients=trial.config["coefficients"], error=error)
        self.ordered.finish(trial.config["number"], failure)
        self._report(failure)

    def _report(self, failure: FailedTrial | None = None) -> None:
        """Call the caller's `progress`; `failure` is the setting that has just failed."""
        if self.progress is None:
            return
        result, explorer = self.explorer.result(), self.explorer
        self.progress(
            Progress(
                done=self.ordered.measured,
                trials=explorer.plan.trials,
                dropped=len(result.dropped),
                failed=self.ordered.failures,
                answers=result.answers,
                front=len(result.front) if result.trials else 0,
                hypervolume=result.hypervolume if result.has_base else 0.0,
                seconds=time.perf_counter() - self.began,
                failure=failure,
            )
        )


def _tune(
    task: Task,
    explorer: Explorer,
    journal: Journal,
    actors: int,
    timeout: float,
    resources: dict[str, float],
    progress: Callable[[Progress], None] | None,
    began: float,
) -> None:
    bundle = bundle_of(resources)
    check_room("a trial of the search", [bundle])
    ordered = Ordered(explorer, actors)
    wait = Waiting(Console(highlight=False), "the search", [bundle])
    conductor = _Conductor(ordered, journal, timeout, progress, began, wait)
    scratch = journal.folder / "tune"
    with _quiet():
        shutil.rmtree(scratch, ignore_errors=True)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, task=task), resources),
            tune_config=tune.TuneConfig(
                search_alg=_Proposer(ordered),
                scheduler=_Halving(conductor),
                num_samples=-1,  # the explorer says when it is enough
                max_concurrent_trials=actors,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(journal.folder),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=DEATHS),
                callbacks=[conductor],
                stop=conductor,
                verbose=0,
            ),
        ).fit()
        shutil.rmtree(scratch, ignore_errors=True)
    if conductor.unfit:
        kept = len(explorer.tried)
        raise JobError(
            f"a trial process could not be set up: {conductor.unfit}; {kept} measured settings are kept in "
            f"{journal.folder}, the same command goes on from them"
        )


# Tune's own log files, tables and tracebacks, off: the journal, one line a trial and `failed` say what
# matters.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's handler would make a search that Ctrl-C stopped look like one that ended.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Snapshots that nothing restores.
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
}


@contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_QUIET)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ranges(task: Task, ranges: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    if not task.vectors:
        raise InputError("no vectors to search over; give at least one")
    for name in ranges or {}:
        if name not in task.vectors:
            raise InputError(f"a range is given for {name!r}, but the vectors are {', '.join(task.vectors)}")
    bounds = {name: tuple(map(float, (ranges or {}).get(name, FULL_RANGE))) for name in task.vectors}
    for name, (low, high) in bounds.items():
        if not -math.inf < low <= 0 <= high < math.inf or low == high:
            raise InputError(
                f"the range of {name!r} is [{low:g}, {high:g}]; it must contain 0, the base, and more than that"
            )
    return bounds  # type: ignore[return-value]


def _within(point: Mapping[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, float]:
    full = {name: float(point.get(name, 0.0)) for name in bounds}
    outside = [name for name in full if not bounds[name][0] <= full[name] <= bounds[name][1]]
    if set(point) - set(bounds) or outside:
        raise InputError(f"start setting {dict(point)} is not within the ranges {bounds}")
    return full


def check_vectors(task: Task) -> str:
    """The base's fingerprint, after every vector was found to belong to it."""
    from prefvec_ray.vectors import fingerprint, load_vector

    expected = fingerprint(task.base)
    for name, folder in task.vectors.items():
        found = load_vector(folder).info.base_fingerprint
        if found != expected:
            raise InputError(
                f"vector {name!r} in {folder} belongs to base {found[:23]}…, {task.base} is {expected[:23]}…; "
                "use the base it was trained on"
            )
    return expected


def _definition(task: Task, goal: Goal, bounds: dict[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    """What makes two searches the same one. Limits and trial counts may change between runs: they alter no
    measurement."""
    from prefvec_ray.vectors import load_vector

    prompts = to_json(task.prompts, fallback=lambda prompt: getattr(prompt, "text", repr(prompt)))
    return {
        "base": task.base_fingerprint,
        "vectors": {name: load_vector(folder).digest() for name, folder in task.vectors.items()},
        "prompts": blake3(prompts).hexdigest(),
        "sampling": [task.draws, task.temperature, task.max_new_tokens, task.seed, task.template],
        "rungs": list(task.rungs),
        "scorer": scorer_digest(task.load_scorer()),
        "measures": list(task.measures),
        "pairs": blake3(json.dumps(dict(task.pairs)).encode()).hexdigest(),
        "objectives": list(goal.objectives),
        "metrics": {name: metric.model_dump() for name, metric in goal.metrics.items()},
        "ranges": {name: list(bound) for name, bound in bounds.items()},
        "seed": seed,
    }

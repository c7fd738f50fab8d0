"""A search over coefficients on Ray Tune: Optuna proposes settings, trial actors measure them, a file keeps
what is known.

Every finished trial is a line of `trials.jsonl`, written before the next one is proposed. A search that was
killed, at any moment and in any way, goes on from those lines when it is called again with the same folder:
plain data, where Tune's own snapshots are pickles that come every few seconds and hold one trial more or
less than was paid for.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from blake3 import blake3
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search.optuna import OptunaSearch

from prefvec_ray.errors import InputError
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.result import FailedTrial, Goal, SearchResult
from prefvec_ray.search.trial import Task, Trial

FULL_RANGE = (-1.0, 1.0)
STUDY = "prefvec"


@dataclass(frozen=True)
class Progress:
    """Where a running search stands, after each finished trial."""

    done: int
    trials: int
    failed: int
    front: int
    hypervolume: float
    seconds: float

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"search: {self.done}/{self.trials} settings{failed}, {self.front} on the front, "
            f"hypervolume {self.hypervolume:.4f}, {self.seconds:.0f} s"
        )


def search(
    task: Task,
    objectives: Sequence[str],
    folder: str | Path,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    limits: Mapping[str, float] | None = None,
    start: Sequence[Mapping[str, float]] = (),
    trials: int = 40,
    actors: int = 4,
    seed: int = 0,
    resources: Mapping[str, float] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search the coefficients of `task.vectors` for the Pareto front of `objectives`, metrics of the task's
    scorer.

    `trials` settings are measured in all, on `actors` processes at once, each with `resources` (default one
    CPU). The base and the settings in `start` come first, the rest is Optuna's multi-objective TPE within
    `ranges` (default [-1, 1]). Settings that break a limit are kept but never enter the front. Trials that
    raise, or score NaN, are listed in `failed`.

    `folder` keeps the trials. A folder of a search that was interrupted is gone on with; one that is
    complete returns at once. With the same seed the proposals differ a little between runs, since they
    depend on which actor finishes first; what a setting scores does not. An active Ray connection is used,
    else Ray is started.

    Raises:
        InputError: a vector of another base, an unknown objective or limit, a range that does not contain
        0, or a folder
            that holds another search.
        RuntimeError: no trial gave a result.
    """
    began = time.perf_counter()
    goal = Goal(objectives=tuple(objectives), metrics=task.metrics, limits=dict(limits or {}))
    goal.check()
    bounds = _ranges(task, ranges)
    points = [dict.fromkeys(bounds, 0.0), *(_within(point, bounds) for point in start)]
    if trials < len(points) or actors < 1:
        raise InputError(f"{trials} trials on {actors} actors; give at least {len(points)} trials and 1 actor")
    task = replace(
        task,
        base=Path(task.base).absolute(),
        vectors={name: Path(vector).absolute() for name, vector in task.vectors.items()},
        base_fingerprint=_check_vectors(task),
    )
    journal = Journal(Path(folder), _definition(task, goal, bounds, seed))
    resumed = len(journal.done)

    if len(journal.done) < trials:
        watcher = _Watcher(journal, goal, trials, progress, began)
        _tune(task, journal, bounds, points, goal, trials - resumed, actors, seed + resumed, resources, watcher)
    if not journal.done:
        first = journal.failed[0].error if journal.failed else "none was started"
        raise RuntimeError(f"no trial of the search gave a result; the first failed with: {first}")
    return SearchResult(
        goal=goal,
        trials=journal.done,
        failed=journal.failed,
        seconds=time.perf_counter() - began,
        resumed=resumed,
    )


class _Watcher(tune.Callback):
    """Writes finished trials into the journal and says where the search stands."""

    def __init__(
        self,
        journal: Journal,
        goal: Goal,
        trials: int,
        progress: Callable[[Progress], None] | None,
        began: float,
    ) -> None:
        self.journal, self.goal, self.trials, self.progress, self.began = journal, goal, trials, progress, began

    def __getstate__(self) -> dict[str, Any]:
        """Tune snapshots its callbacks. Nothing ever restores this one, and a caller's progress bar cannot
        be pickled."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Watcher":
        return self

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        self.journal.add(result["evaluation"])
        self._report()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        # The traceback's last line names the exception; the file lies beside the driver and is plain text.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line for line in text.splitlines() if line.strip()]
        error = lines[-1] if lines else "the trial's process died"
        self.journal.failed.append(FailedTrial(coefficients=trial.config, error=error))
        self._report()

    def _report(self) -> None:
        if self.progress is None:
            return
        so_far = SearchResult(goal=self.goal, trials=self.journal.done)
        has_base = any(not any(trial.coefficients.values()) for trial in so_far.trials)
        self.progress(
            Progress(
                done=len(self.journal.done),
                trials=self.trials,
                failed=len(self.journal.failed),
                front=len(so_far.front),
                hypervolume=so_far.hypervolume if has_base else 0.0,
                seconds=time.perf_counter() - self.began,
            )
        )


def _tune(
    task: Task,
    journal: Journal,
    bounds: dict[str, tuple[float, float]],
    points: list[dict[str, float]],
    goal: Goal,
    trials: int,
    actors: int,
    seed: int,
    resources: Mapping[str, float] | None,
    watcher: _Watcher,
) -> None:
    distributions = {name: optuna.distributions.FloatDistribution(*bound) for name, bound in bounds.items()}
    modes = ["max" if goal.metrics[name].direction == "maximize" else "min" for name in goal.objectives]
    storage = optuna.storages.InMemoryStorage()
    with _quiet():
        study = optuna.create_study(study_name=STUDY, storage=storage, directions=[mode + "imize" for mode in modes])
        for evaluation in journal.done:
            values = [evaluation.mean(name) for name in goal.objectives]
            known = optuna.trial.create_trial(
                params=evaluation.coefficients, distributions=distributions, values=values
            )
            study.add_trial(known)
        measured = [evaluation.coefficients for evaluation in journal.done]
        for point in points:
            if point not in measured:
                study.enqueue_trial(point)
        proposer = OptunaSearch(
            space=distributions,
            metric=[f"score/{name}" for name in goal.objectives],
            mode=modes,
            study_name=STUDY,
            storage=storage,
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
        )
        scratch = journal.folder / "tune"
        shutil.rmtree(scratch, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, task=task), dict(resources or {"cpu": 1})),
            tune_config=tune.TuneConfig(
                search_alg=proposer, num_samples=trials, max_concurrent_trials=actors, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(journal.folder),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[watcher],
                verbose=0,
            ),
        )
        tuner.fit()
        shutil.rmtree(scratch, ignore_errors=True)


# Tune's own log files, tables and tracebacks, off: the journal, one line a trial and `failed` say what
# matters.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's handler would make a search that Ctrl-C stopped look like one that ended.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    verbosity = optuna.logging.get_verbosity()
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_QUIET)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
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
        if not low <= 0 <= high or low == high:
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


def _check_vectors(task: Task) -> str:
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

    prompts = json.dumps([getattr(prompt, "text", prompt) for prompt in task.prompts])
    return {
        "base": task.base_fingerprint,
        "vectors": {name: load_vector(folder).digest() for name, folder in task.vectors.items()},
        "prompts": blake3(prompts.encode()).hexdigest(),
        "sampling": [task.draws, task.temperature, task.max_new_tokens, task.seed, task.template],
        "pairs": blake3(json.dumps(dict(task.pairs)).encode()).hexdigest(),
        "objectives": list(goal.objectives),
        "metrics": {name: metric.model_dump() for name, metric in goal.metrics.items()},
        "ranges": {name: list(bound) for name, bound in bounds.items()},
        "seed": seed,
    }

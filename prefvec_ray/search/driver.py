"""An `Explorer` carried out on Ray Tune: it proposes, trials ask the pool, the journal keeps every result."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher
from rich.console import Console

from prefvec_ray.common.errors import JobError
from prefvec_ray.common.scheduling import Waiting, bundle_of, check_room
from prefvec_ray.search.explore import Explorer
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.ordered import Ordered
from prefvec_ray.search.pool import DEATHS, start_pool
from prefvec_ray.search.progress import Progress
from prefvec_ray.search.result import FailedTrial, Tried
from prefvec_ray.search.trial import Task

NO_ROOM = {"memory": 1}
"""Of a trial's process, which only waits. Ray wants something to be asked for."""


def run_trials(
    task: Task, explorer: Explorer, journal: Journal, progress: Callable[[Progress], None] | None, began: float
) -> None:
    """Measure what the explorer proposes until it has ended.

    Raises:
        InputError: a trial that the cluster can never hold.
        JobError: a trial process cannot be set up.
    """
    config = explorer.config
    bundle = bundle_of(config.resources)
    check_room("a process of the search", [bundle])
    wait = Waiting(Console(highlight=False), "the search", [bundle])
    pool = start_pool(task, config.rungs, config, timeout=config.timeout)
    monitor = _Monitor(Ordered(explorer, config.in_flight), journal, progress, began, wait, pool)
    scratch = journal.folder / "tune"
    with _quiet(), _ending(pool):
        shutil.rmtree(scratch, ignore_errors=True)
        tune.Tuner(
            tune.with_resources(_trial(pool), NO_ROOM),
            tune_config=tune.TuneConfig(
                search_alg=_Proposer(monitor.ordered),
                num_samples=-1,  # the explorer decides when it is enough
                max_concurrent_trials=config.in_flight,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(journal.folder),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=DEATHS),
                callbacks=[monitor],
                stop=monitor,
                verbose=0,
            ),
        ).fit()
        shutil.rmtree(scratch, ignore_errors=True)
    if monitor.unfit:
        kept = len(explorer.tried)
        raise JobError(
            f"a trial process could not be set up: {monitor.unfit}; {kept} measured settings are kept in "
            f"{journal.folder}, the same command resumes from them"
        )


def _trial(pool: Any) -> type[tune.Trainable]:
    """A trainable of one step a rung, whose process only waits for the pool.

    It is defined in here to travel by value: its process imports neither this package nor torch.
    """

    class Measurement(tune.Trainable):
        def step(self) -> dict[str, Any]:
            found = pool.step.remote(self.config["number"], self.config["coefficients"], self.iteration)
            return dict(ray.get(found))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

    return Measurement


class _Proposer(Searcher):
    """The explorer's proposals as Tune asks for them."""

    def __init__(self, ordered: Ordered) -> None:
        super().__init__()
        self.ordered = ordered

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self.ordered.propose()
        if proposal is None and self.ordered.over:
            return Searcher.FINISHED
        return None if proposal is None else {"number": proposal.number, "coefficients": proposal.coefficients}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the monitor has the result already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its journal."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its journal")


class _Monitor(tune.Callback, tune.Stopper):
    """Takes in what trials report, stops those that have lost, and cancels what is in flight when the explorer is
    closed."""

    def __init__(
        self,
        ordered: Ordered,
        journal: Journal,
        progress: Callable[[Progress], None] | None,
        began: float,
        wait: Waiting,
        pool: Any,
    ) -> None:
        self.ordered, self.explorer, self.journal, self.wait = ordered, ordered.explorer, journal, wait
        self.progress, self.began, self._pool, self._up = progress, began, pool, False
        self.unfit = ""
        """Why a trial process could not be set up."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune snapshots its callbacks. Nothing ever restores this one, and a caller's progress bar cannot be
        pickled."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Monitor":
        return self

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take in what a trial reports after each rung; whether it ends there."""
        if self.explorer.closed:
            return False
        if result.get("unfit"):
            self.unfit = self.unfit or result["error"]
            self.explorer.give_up(self.unfit)
            return True
        if "error" in result:
            self._failed(result["config"], result["error"])
            return True
        number = result["config"]["number"]
        tried = Tried.model_validate_json(result["tried"])
        if not tried.complete and self.ordered.promising(number, tried.rungs):
            return False
        flaw = self.explorer.flaw(tried)
        if flaw:
            self._failed(result["config"], flaw)
            return True
        tried = tried.model_copy(update={"order": self.ordered.order(number)})
        self.journal.add(tried)
        self.ordered.finish(number, tried)
        self._report()
        return True

    def stop_all(self) -> bool:
        return self.explorer.closed

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self.explorer.closed:
            return
        # The traceback's last line names the exception; the file lies beside the driver and is plain text.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no reason given"
        self._failed(trial.config, f"its process died {1 + DEATHS} times; {last}")

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Report what the search waits for: Tune calls this several times a second."""
        self._up = self._up or ray.get(self._pool.up.remote())
        self.wait.poll(started=self._up)

    def _failed(self, proposal: dict[str, Any], error: str) -> None:
        failure = FailedTrial(coefficients=proposal["coefficients"], error=error)
        self.ordered.finish(proposal["number"], failure)
        self._report(failure)

    def _report(self, failure: FailedTrial | None = None) -> None:
        """Call the caller's `progress`; `failure` is the setting that has just failed."""
        if self.progress is None:
            return
        result, explorer = self.explorer.result(), self.explorer
        self.progress(
            Progress(
                done=self.ordered.measured,
                trials=explorer.config.trials,
                dropped=len(result.dropped),
                failed=self.ordered.failures,
                answers=result.answers,
                front=len(result.front) if result.trials else 0,
                hypervolume=result.hypervolume if result.has_base else 0.0,
                seconds=time.perf_counter() - self.began,
                failure=failure,
            )
        )


# Tune's own log files, tables and tracebacks, off: the journal, one line a trial and `failed` say what
# matters.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's handler would report a search that Ctrl-C stopped as one that ended.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Snapshots that nothing restores.
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
}


@contextmanager
def _ending(pool: Any) -> Iterator[None]:
    try:
        yield
    finally:
        ray.kill(pool)


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

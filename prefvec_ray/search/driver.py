"""An `Explorer` carried out on Ray Tune: it proposes, trial actors measure, the journal keeps every result."""

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
from prefvec_ray.common.pool import DEATHS
from prefvec_ray.common.scheduling import Waiting, bundle_of, check_room
from prefvec_ray.search.explore import Explorer
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.ordered import Ordered
from prefvec_ray.search.progress import Progress
from prefvec_ray.search.result import FailedTrial, Tried
from prefvec_ray.search.trial import Task, Trial


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
    check_room("a trial of the search", [bundle])
    wait = Waiting(Console(highlight=False), "the search", [bundle])
    monitor = _Monitor(Ordered(explorer, config.actors), journal, progress, began, wait)
    scratch = journal.folder / "tune"
    trial = tune.with_parameters(Trial, task=task, rungs=config.rungs)
    with _quiet():
        shutil.rmtree(scratch, ignore_errors=True)
        tune.Tuner(
            tune.with_resources(trial, config.resources),
            tune_config=tune.TuneConfig(
                search_alg=_Proposer(monitor.ordered),
                num_samples=-1,  # the explorer decides when it is enough
                max_concurrent_trials=config.actors,
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
    """Takes in what trials report, stops those that have lost, kills what hangs, and cancels what is in flight when the
    explorer is closed."""

    def __init__(
        self,
        ordered: Ordered,
        journal: Journal,
        progress: Callable[[Progress], None] | None,
        began: float,
        wait: Waiting,
    ) -> None:
        self.ordered, self.explorer, self.journal, self.wait = ordered, ordered.explorer, journal, wait
        self.timeout, self.progress, self.began = ordered.explorer.config.timeout, progress, began
        self._since: dict[str, float] = {}
        self._killed: set[str] = set()
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
        self._since[trial_id] = time.monotonic()
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

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._since[trial.trial_id] = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self.explorer.closed:
            return
        if trial.trial_id in self._killed:
            self._failed(trial.config, f"no result within {self.timeout:g} s of a rung; its process was killed")
            return
        # The traceback's last line names the exception; the file lies beside the driver and is plain text.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no reason given"
        self._failed(trial.config, f"its process died {1 + DEATHS} times; {last}")

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Kill trials that hang: Tune calls this several times a second."""
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

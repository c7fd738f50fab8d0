"""Ray Train runs: started, restarted where a process was lost, and kept while their job has more to do.

A worker group costs some twenty seconds of processor time before its first step: Ray Train's own processes, and the
imports of torch and TRL. One that has ended its task soon takes the job's next one instead of being started anew.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from prefvec_ray.artifacts.training import PLAIN, Method
from prefvec_ray.training.config import Resources
from prefvec_ray.training.failures import LOST, RunsFailedError, failed_part, failure_reason, worker_died
from prefvec_ray.training.fsdp import process_group
from prefvec_ray.training.progress import job_board
from prefvec_ray.training.workers import take_turns

KEPT_SECONDS = 120.0
"""A worker group that has worked for so long ends with its task: starting another is little beside that, and whoever
else waits for room in the cluster gets a turn."""
PATIENCE = 20.0
"""Seconds to wait, at the end of a job, until its idle worker groups have given their room back."""

Lost = Callable[[Exception], None]


def start_run(
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    name: str,
    resources: Resources,
    storage: Path,
    *,
    retries: int = 2,
    lost: Lost | None = None,
    method: Method = PLAIN,
    doing: Callable[[], Hashable] = lambda: None,
) -> Future[Any]:
    """One Ray Train run of `worker(config)`, from now on; its result is what its rank 0 returned.

    It is started again up to `retries` times after a worker or its node died, or Ray Train's controller failed. An
    exception that the worker raised itself would only be raised again, so it ends the run at once. Ctrl-C works while
    one waits for the result: in the main thread Ray Train would take that signal over and never give it back, so a
    thread of its own controls the run.

    Args:
        lost: called in that thread when a worker was lost, before the run is started again, with the error that Ray
            Train raised; a line is printed where this is left out.
        doing: what the run is at, where it does several things in turn: the losses of each are counted apart.

    Raises:
        RunsFailedError: from `result()`: the run failed for good; the message is the reason alone.
    """

    def trainer() -> TorchTrainer:
        return TorchTrainer(
            worker,
            train_loop_config=config,
            torch_config=TorchConfig(backend=process_group(method, gpus=resources.gpus_per_worker > 0)),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=dict(resources.bundles[0]),
            ),
            run_config=RunConfig(name=name, storage_path=str(storage)),
        )

    run: Future[Any] = Future()

    def control() -> None:
        try:
            run.set_result(_fit(trainer, retries, lost or _sayer(name), doing))
        except BaseException as error:  # raised again where the result is asked for
            run.set_exception(error)

    threading.Thread(target=control, daemon=True).start()
    return run


def _sayer(name: str) -> Lost:
    def say(error: Exception) -> None:
        kept = "it is started again and keeps what it has finished"
        print(f"   {name}: {failed_part(error)} ({failure_reason(error)}); {kept}", flush=True)

    return say


def _fit(trainer: Callable[[], TorchTrainer], retries: int, lost: Lost, doing: Callable[[], Hashable]) -> Any:
    """What a run returned. It is started again where a process of it was lost; `lost` is called each time."""
    losses: Counter[Hashable] = Counter()
    while True:
        try:
            return trainer().fit().return_value
        except (TrainingFailedError, *LOST) as error:  # the second kind: the run's controller itself was lost
            losses[doing()] += 1
            if losses[doing()] > retries or not worker_died(error):
                raise RunsFailedError(failure_reason(error)) from error
            lost(error)


@dataclass(eq=False)
class _Group:
    """One worker group: a Ray Train run that takes tasks from the job's board."""

    name: str
    """On the board: no two groups of a job have one name."""
    resources: Resources
    backend: str | None
    tasks: int = 0
    """How many it was given."""
    task: Future[None] | None = None
    """What it is at; None: nothing."""
    lost: Lost | None = None
    run: Future[int] = field(default_factory=Future)
    """Of the Ray Train run; its result: how many tasks were ended."""

    def report(self, error: Exception) -> None:
        """Of a process that was lost: to whoever gave the task, and to nobody while it had none."""
        if self.task is not None and self.lost is not None:
            self.lost(error)


class WorkerGroups:
    """The worker groups of one job. Made by `worker_groups`.

    Args:
        board: of `job_board`; it hands the tasks to the workers.
        storage: Ray Train's own files go here (shared by all nodes).
        retries: how often a task is begun again after a process or node was lost.
    """

    def __init__(self, board: Any, storage: Path, *, retries: int = 2) -> None:
        self.board, self.storage, self.retries = board, storage, retries
        self._groups: list[_Group] = []
        self._numbers = count()
        self._ending: list[Future[int]] = []
        self._lock = threading.RLock()

    def start(
        self,
        worker: Callable[[dict[str, Any]], Any],
        given: dict[str, Any],
        name: str,
        resources: Resources,
        *,
        method: Method = PLAIN,
        lost: Lost | None = None,
        alone: bool = False,
    ) -> Future[None]:
        """Call `worker({**given, "board": board})` on every worker of a group: an idle one, or a new Ray Train run.

        Args:
            name: of the Ray Train run, where one is started.
            lost: as of `start_run`.
            alone: the group ends with this task, since it leaves something behind in its processes.

        Returns:
            Done when rank 0 has ended the task. Its exception is a RunsFailedError, the message the reason alone.
        """
        backend = process_group(method, gpus=resources.gpus_per_worker > 0)
        pickled, task = cloudpickle.dumps((worker, given)), Future[None]()
        with self._lock:
            idle = [g for g in self._idle() if (g.resources, g.backend) == (resources, backend)]
            group = idle[0] if idle else _Group(f"{name} {next(self._numbers)}", resources, backend)
            group.task, group.lost = task, lost or _sayer(name)
            group.tasks += 1
            if idle:
                self.board.give.remote(group.name, group.tasks, pickled)
            else:
                self._begin(group, pickled, name, method)
        ended = self.board.ended.remote(group.name, group.tasks).future()
        ended.add_done_callback(lambda done: self._task_ended(group, done, alone))
        return task

    def release(self) -> None:
        """Let the idle groups end: nothing more is there for them at the moment."""
        with self._lock:
            for group in self._idle():
                self._end(group)

    def close(self) -> None:
        """`release`, and wait until their room is free again."""
        self.release()
        wait(self._ending, timeout=PATIENCE)

    def _idle(self) -> list[_Group]:
        return [group for group in self._groups if group.task is None]

    def _begin(self, group: _Group, task: bytes, name: str, method: Method) -> None:
        self.release()  # idle groups of other resources hold room
        self._groups.append(group)
        group.run = start_run(
            take_turns,
            {"board": self.board, "group": group.name, "first": task},
            name,
            group.resources,
            self.storage,
            retries=self.retries,
            lost=group.report,
            method=method,
            doing=lambda: group.tasks,
        )
        group.run.add_done_callback(lambda run: self._run_ended(group, run))

    def _task_ended(self, group: _Group, ended: Future[float], alone: bool) -> None:
        if ended.exception() is not None:  # the board was lost: the run's own end tells how the task ended
            return
        with self._lock:
            task, group.task = group.task, None
            if alone or ended.result() > KEPT_SECONDS:
                self._end(group)
        if task is not None:
            task.set_result(None)

    def _run_ended(self, group: _Group, run: Future[int]) -> None:
        with self._lock:
            if group in self._groups:
                self._groups.remove(group)
            task, group.task = group.task, None
        if task is None:
            return
        if (error := run.exception()) is not None:
            task.set_exception(error)
        elif run.result() < group.tasks:
            task.set_exception(RunsFailedError("the process that hands out the runs was lost: run the command again"))
        else:
            task.set_result(None)

    def _end(self, group: _Group) -> None:
        self._groups.remove(group)
        self._ending.append(group.run)
        self.board.give.remote(group.name, group.tasks + 1, None)


@contextmanager
def worker_groups(folder: Path, storage: Path, *, retries: int = 2) -> Iterator[WorkerGroups]:
    """The worker groups of the one job that trains into `folder`, with its board.

    Raises:
        JobError: another job of this cluster is training into the folder.
    """
    with job_board(folder) as board:
        groups = WorkerGroups(board, storage, retries=retries)
        try:
            yield groups
        finally:
            groups.close()

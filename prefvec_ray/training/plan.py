"""Many DPO runs at once on Ray Train: N preferences x 2 polarities x seeds, each its own TorchTrainer.

A thread of the driver controls each run: it waits in `TorchTrainer.fit`. At most as many runs are started as fit on the
cluster, so that queued runs cost nothing and none waits for what another holds. A failed run does not stop the others.
"""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.train import (
    ControllerError,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from prefvec_ray.artifacts.training import PLAIN, Artifact, Method, RunResult, RunSpec
from prefvec_ray.common.cluster import lost_because
from prefvec_ray.common.errors import JobError, from_traceback, message_lines
from prefvec_ray.common.files import read_model
from prefvec_ray.common.scheduling import Waiting, check_room
from prefvec_ray.training.checkpoints import checkpoint_folder, newest_checkpoint, remove_checkpoints
from prefvec_ray.training.config import Resources, TrainingConfig
from prefvec_ray.training.fsdp import process_group
from prefvec_ray.training.progress import ProgressTable, follow, job_board
from prefvec_ray.training.workers import dpo_worker

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # killed by Ray, since its node ran low on memory
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL Error",
    "DistBackendError",
    "EADDRINUSE",  # the port that Ray Train found free was taken before torch listened there
)
"""What gloo and NCCL raise on the other workers when one died, and when two runs met at one port."""

OWN = "prefvec_ray."


class RunsFailedError(JobError):
    """Some runs of a plan failed; the finished ones are kept and will be skipped next time."""


def read_run(spec: RunSpec) -> RunResult:
    """The result of a finished run, with its folders as they lie now: a job may have been moved."""
    result = read_model(
        Path(spec.out) / "run.json", RunResult, f"delete {spec.out}, and the same command trains it again"
    )
    return result.model_copy(update={"spec": result.spec.lying_where(spec)})


def run_plan(
    specs: list[RunSpec], resources: Resources, storage: Path, *, retries: int = 2, board: Any = None
) -> list[RunResult]:
    """Run what is not finished yet, as many at once as the cluster holds, with one live table for all.

    A run that was interrupted, in this job or an earlier one, continues from its checkpoint.

    Args:
        storage: Ray Train's own files go here (shared by all nodes).
        retries: how often a run is started again after a process or node of it was lost.
        board: of `job_board`; one for this plan alone is made where it is left out.

    Returns:
        The result of every spec, in order.

    Raises:
        RunsFailedError: names every run that failed and its first line of reason, after all others have ended.
    """
    if board is None:
        with job_board(storage) as board:
            return run_plan(specs, resources, storage, retries=retries, board=board)
    labels = [spec.label for spec in specs]
    waiting = [spec for spec in specs if not spec.is_finished]
    with ProgressTable(labels, title="DPO runs") as table:
        for spec in specs:
            if spec.is_finished:
                remove_checkpoints(spec.out)  # of a run whose driver was killed as it finished
                table.finish(spec.label, "finished")
        try:
            failures = _run_waiting(waiting, resources, storage, retries, board, table) if waiting else {}
        finally:
            _ask_autoscaler(0, resources)
    if failures:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in failures.items())
        raise RunsFailedError(f"{len(failures)} of {len(specs)} runs failed, the others are kept: {reasons}")
    return [read_run(spec) for spec in specs]


def _run_waiting(
    waiting: list[RunSpec], resources: Resources, storage: Path, retries: int, board: Any, table: ProgressTable
) -> dict[str, str]:
    """Drive the runs until all have ended; the reasons of those that failed, by label."""
    check_room("a run", resources.bundles)
    wait_for_room = Waiting(table.console, "a run", resources.bundles)
    waiting = list(reversed(waiting))
    failures: dict[str, str] = {}
    running: dict[Future[Any], RunSpec] = {}
    _ask_autoscaler(len(waiting), resources)
    while waiting or running:
        # Counted anew each time: a cluster may grow. Workers of one run are reserved all together or not at all
        # (a placement group), so that runs which wait for each other's rest cannot be.
        while waiting and len(running) < max(1, slots(resources)):
            spec = waiting.pop()
            config = {"spec": spec.model_dump(), "board": board}
            lost = _reporter(spec, resources.workers, board, table)
            run = start_run(
                dpo_worker, config, spec.key, resources, storage, retries=retries, lost=lost, method=spec.method
            )
            running[run] = spec
        for run in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
            spec, error = running.pop(run), run.exception()
            if error is not None:
                known = isinstance(error, RunsFailedError)
                failures[spec.label] = str(error) if known else f"{type(error).__name__}: {error}"
                board.fail.remote(spec.label, failures[spec.label])
            table.finish(spec.label, "failed" if error else "finished", failures.get(spec.label, ""))
            _ask_autoscaler(len(waiting) + len(running), resources)
        with suppress(ray.exceptions.RayActorError):  # the board's node was lost: the runs continue without it
            rows = ray.get(board.read.remote())
            table.update(rows)
            wait_for_room.poll(started=all(spec.label in rows for spec in running.values()))
    return failures


def _ask_autoscaler(runs: int, resources: Resources) -> None:
    """Ask the autoscaler for room for all unfinished runs, since queued runs have asked Ray for nothing yet.

    The newest request of all jobs of a cluster counts. Where there is no autoscaler, nothing happens.
    """
    request_resources(bundles=resources.bundles * runs)


def start_run(
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    name: str,
    resources: Resources,
    storage: Path,
    *,
    retries: int = 2,
    lost: Callable[[Exception], None] | None = None,
    method: Method = PLAIN,
) -> Future[Any]:
    """One Ray Train run of `worker(config)`, from now on; its result is what its rank 0 returned.

    It is started again up to `retries` times after a worker or its node died, or Ray Train's controller failed. An
    exception that the worker raised itself would only be raised again, so it ends the run at once. Ctrl-C works while
    one waits for the result: in the main thread Ray Train would take that signal over and never give it back, so a
    thread of its own controls the run.

    Args:
        lost: called in that thread when a worker was lost, before the run is started again, with the error that Ray
            Train raised; a line is printed where this is left out.

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

    def say(error: Exception) -> None:
        kept = "it is started again and keeps what it has finished"
        print(f"   {name}: {_failed_part(error)} ({failure_reason(error)}); {kept}", flush=True)

    def control() -> None:
        try:
            run.set_result(_fit(trainer, retries, lost or say))
        except BaseException as error:  # raised again where the result is asked for
            run.set_exception(error)

    threading.Thread(target=control, daemon=True).start()
    return run


def run_stage(
    worker: Callable[[dict[str, Any]], Any],
    job: Artifact,
    name: str,
    config: TrainingConfig,
    board: Any,
    *,
    resources: Resources,
    row: str,
    what: str,
    steps: str,
) -> None:
    """One Ray Train run of `worker({"job", "board"})` before the DPO runs, with a bar of `steps` until it has ended.

    Args:
        row: of the board, where the worker reports its steps.
        what: the stage, in messages.

    Raises:
        InputError: the cluster can never hold it.
        RunsFailedError: it failed; no DPO run was started.
    """
    check_room(what, resources.bundles)
    given = {"job": job.model_dump(), "board": board}
    storage = config.folder / "ray"
    run = start_run(worker, given, name, resources, storage, retries=config.retries, method=config.run_method)
    console = Console(highlight=False)
    try:
        follow(run, board, row, steps, console, Waiting(console, what, resources.bundles))
    except RunsFailedError as error:
        raise RunsFailedError(f"{what} failed, no DPO run was started: {error}") from error


def _reporter(spec: RunSpec, workers: int, board: Any, table: ProgressTable) -> Callable[[Exception], None]:
    """Reports in a line of `table` which run lost a worker, on which node, and from which step it continues."""

    def report(error: Exception) -> None:
        places: dict[int, str] = {}
        with suppress(ray.exceptions.RayError):  # the board was lost with that node: which one is not known then
            places = ray.get(board.places.remote(spec.label), timeout=10)
        nodes = sorted({places[rank] for rank in _lost_ranks(error) if rank in places})
        where = f" (node {', '.join(nodes)})" if nodes else ""
        if isinstance(error, ControllerError):
            where = f" ({failure_reason(error)})"
        found = newest_checkpoint(checkpoint_folder(spec.out), workers)
        then = f"it continues from step {found[1]}" if found else "it starts over: it has no checkpoint yet"
        table.say(f"{spec.label}: {_failed_part(error)}{where}; {then}")

    return report


def _fit(trainer: Callable[[], TorchTrainer], retries: int, lost: Callable[[Exception], None]) -> Any:
    """What a run returned. It is started again where a process of it was lost; `lost` is called each time."""
    for attempt in range(retries + 1):
        try:
            return trainer().fit().return_value
        except (TrainingFailedError, *LOST) as error:  # the second kind: the run's controller itself was lost
            if attempt == retries or not _worker_died(error):
                raise RunsFailedError(failure_reason(error)) from error
            lost(error)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _worker_died(error: Exception) -> bool:
    """Whether a process was lost, while it trained (a worker group's failures) or while it was being set up.

    What the training itself raises comes as a worker group's failure: Ray Train's controller fails only by what happens
    around it, such as a call to a busy node that took too long. When one of several workers dies or stops the run for a
    reason, the others may be the first to fail, since their connection to it is closed.
    """
    failures = [_cause(error), *getattr(error, "worker_failures", {}).values()]
    if any(map(_is_own, failures)):
        return False
    if isinstance(error, (PreemptionError, ControllerError)) or any(isinstance(_cause(f), LOST) for f in failures):
        return True
    return any(sign in str(failure) for failure in failures for sign in COLLATERAL)


def _failed_part(error: Exception) -> str:
    return "Ray Train failed" if isinstance(error, ControllerError) else "a worker was lost"


def _cause(failure: Any) -> Any:
    """What a failed health check found, or what failed in Ray Train's controller; any other failure itself."""
    for attribute in ("health_check_failure", "controller_failure"):
        failure = getattr(failure, attribute, failure)
    return failure


def _lost_ranks(error: Exception) -> list[int]:
    """The ranks whose process is gone, not those that only lost their connection to it."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    return [rank for rank, failure in failures.items() if isinstance(_cause(failure), LOST)]


def failure_reason(error: Exception) -> str:
    """In a line, what the failing worker raised.

    Of several workers the one that raised an error of ours has the reason; the others only lost their connection.
    """
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    failures = failures or [error]
    return from_traceback(_line(next(filter(_is_own, failures), failures[0])))


def _lines(error: Exception) -> list[str]:
    return message_lines(error) or [type(error).__name__]


def _is_own(failure: Exception) -> bool:
    """Whether our code raised it: Ray Train hands over what a worker raised itself, its controller a traceback."""
    return type(failure).__module__.startswith(OWN) or _lines(failure)[-1].startswith(OWN)


def _line(failure: Exception) -> str:
    """What a worker raised, or the end of its traceback; of a lost process what Ray says of its end."""
    cause = _cause(failure)
    lines = _lines(cause)
    if isinstance(cause, LOST):
        return f"a process was lost: {lost_because(cause)}"
    if lines[0].startswith("Traceback"):
        return lines[-1]
    return lines[0] if _is_own(cause) else f"{type(cause).__name__}: {lines[0]}"


def slots(resources: Resources, *, free: bool = False) -> int:
    """How many runs the cluster holds at once, by its CPUs and GPUs: all of them, or only those free right now."""
    total = ray.available_resources() if free else ray.cluster_resources()
    count = total.get("CPU", 0) / (resources.cpus_per_worker * resources.workers)
    if resources.gpus_per_worker:
        count = min(count, total.get("GPU", 0) / (resources.gpus_per_worker * resources.workers))
    return int(count)

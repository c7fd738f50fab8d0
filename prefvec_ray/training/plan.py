"""Many DPO runs at once on Ray Train: N preferences x 2 polarities x seeds.

At most as many runs are started as fit on the cluster, so that queued runs cost nothing and none waits for what another
holds. Short runs take turns in the worker groups that fit. A failed run does not stop the others.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.train import ControllerError
from rich.console import Console

from prefvec_ray.artifacts.training import Artifact, RunResult, RunSpec
from prefvec_ray.common.files import read_model
from prefvec_ray.common.scheduling import Waiting, check_room
from prefvec_ray.training.checkpoints import checkpoint_folder, newest_checkpoint, remove_checkpoints
from prefvec_ray.training.config import Resources, TrainingConfig
from prefvec_ray.training.failures import RunsFailedError, failed_part, failure_reason, lost_ranks
from prefvec_ray.training.progress import ProgressTable, follow
from prefvec_ray.training.worker_groups import WorkerGroups, worker_groups
from prefvec_ray.training.workers import dpo_worker


def read_run(spec: RunSpec) -> RunResult:
    """The result of a finished run, with its folders as they lie now: a job may have been moved."""
    result = read_model(
        Path(spec.out) / "run.json", RunResult, f"delete {spec.out}, and the same command trains it again"
    )
    return result.model_copy(update={"spec": result.spec.lying_where(spec)})


def run_plan(
    specs: list[RunSpec],
    resources: Resources,
    storage: Path,
    *,
    retries: int = 2,
    groups: WorkerGroups | None = None,
) -> list[RunResult]:
    """Run what is not finished yet, as many at once as the cluster holds, with one live table for all.

    A run that was interrupted, in this job or an earlier one, continues from its checkpoint.

    Args:
        storage: Ray Train's own files go here (shared by all nodes).
        retries: how often a run is started again after a process or node of it was lost.
        groups: of the job, with its storage and retries; made for this plan alone where they are left out.

    Returns:
        The result of every spec, in order.

    Raises:
        RunsFailedError: names every run that failed and its first line of reason, after all others have ended.
    """
    if groups is None:
        with worker_groups(storage, storage, retries=retries) as groups:
            return run_plan(specs, resources, storage, groups=groups)
    labels = [spec.label for spec in specs]
    waiting = [spec for spec in specs if not spec.is_finished]
    with ProgressTable(labels, title="DPO runs") as table:
        for spec in specs:
            if spec.is_finished:
                remove_checkpoints(spec.out)  # of a run whose driver was killed as it finished
                table.finish(spec.label, "finished")
        try:
            failures = _run_waiting(waiting, resources, groups, table) if waiting else {}
        finally:
            _ask_autoscaler(0, resources)
    if failures:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in failures.items())
        raise RunsFailedError(f"{len(failures)} of {len(specs)} runs failed, the others are kept: {reasons}")
    return [read_run(spec) for spec in specs]


def _run_waiting(
    waiting: list[RunSpec], resources: Resources, groups: WorkerGroups, table: ProgressTable
) -> dict[str, str]:
    """Drive the runs until all have ended; the reasons of those that failed, by label."""
    check_room("a run", resources.bundles)
    board = groups.board
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
            given = {"spec": spec.model_dump()}
            lost = _reporter(spec, resources.workers, board, table)
            tracked = bool(spec.watch.report_to)  # trackers keep one run a process
            run = groups.start(dpo_worker, given, spec.key, resources, method=spec.method, lost=lost, alone=tracked)
            running[run] = spec
        groups.release()
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


def run_stage(
    worker: Callable[[dict[str, Any]], Any],
    job: Artifact,
    name: str,
    config: TrainingConfig,
    groups: WorkerGroups,
    *,
    resources: Resources,
    row: str,
    what: str,
    steps: str,
) -> None:
    """`worker({"job", "board"})` on a worker group before the DPO runs, with a bar of `steps` until it has ended.

    Args:
        row: of the board, where the worker reports its steps.
        what: the stage, in messages.

    Raises:
        InputError: the cluster can never hold it.
        RunsFailedError: it failed; no DPO run was started.
    """
    check_room(what, resources.bundles)
    run = groups.start(worker, {"job": job.model_dump()}, name, resources, method=config.run_method)
    console = Console(highlight=False)
    try:
        follow(run, groups.board, row, steps, console, Waiting(console, what, resources.bundles))
    except RunsFailedError as error:
        raise RunsFailedError(f"{what} failed, no DPO run was started: {error}") from error


def _reporter(spec: RunSpec, workers: int, board: Any, table: ProgressTable) -> Callable[[Exception], None]:
    """Reports in a line of `table` which run lost a worker, on which node, and from which step it continues."""

    def report(error: Exception) -> None:
        places: dict[int, str] = {}
        with suppress(ray.exceptions.RayError):  # the board was lost with that node: which one is not known then
            places = ray.get(board.places.remote(spec.label), timeout=10)
        nodes = sorted({places[rank] for rank in lost_ranks(error) if rank in places})
        where = f" (node {', '.join(nodes)})" if nodes else ""
        if isinstance(error, ControllerError):
            where = f" ({failure_reason(error)})"
        found = newest_checkpoint(checkpoint_folder(spec.out), workers)
        then = f"it continues from step {found[1]}" if found else "it starts over: it has no checkpoint yet"
        table.say(f"{spec.label}: {failed_part(error)}{where}; {then}")

    return report


def slots(resources: Resources, *, free: bool = False) -> int:
    """How many runs the cluster holds at once, by its CPUs and GPUs: all of them, or only those free right now."""
    total = ray.available_resources() if free else ray.cluster_resources()
    count = total.get("CPU", 0) / (resources.cpus_per_worker * resources.workers)
    if resources.gpus_per_worker:
        count = min(count, total.get("GPU", 0) / (resources.gpus_per_worker * resources.workers))
    return int(count)

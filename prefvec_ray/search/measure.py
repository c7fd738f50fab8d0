"""Many settings measured: a few processes, each with one model, share a list of settings."""

from collections.abc import Callable, Mapping, Sequence

import ray
from rich.console import Console

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.cluster import reason
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.scheduling import Waiting, bundle_of, check_room
from prefvec_ray.search.options import Processes
from prefvec_ray.search.pool import start_pool
from prefvec_ray.search.result import Tried
from prefvec_ray.search.trial import Task


def measure(
    task: Task,
    settings: Sequence[Mapping[str, float]],
    processes: Processes,
    *,
    progress: Callable[[int, int], None] | None = None,
    console: Console | None = None,
) -> list[Evaluation]:
    """Evaluate every setting of `task.vectors`, in the order given, on processes of the cluster.

    As many processes measure as the cluster has room for, and one is enough. More start as room comes free, and a
    process that is lost is replaced where there is room. What a setting scores does not depend on which process
    measures it, or beside what. `progress(done, total)` is called after each setting. Where there is no room, `console`
    says what is missing (default: standard output).

    Raises:
        InputError: as `Evaluator` and its scorer; a process that the cluster can never hold.
        JobError: the scorer raised something else, or processes died again and again.
    """
    task.check()
    if not settings:
        return []
    bundle = bundle_of(processes.resources)
    check_room("a process that measures", [bundle])
    processes = processes.model_copy(update={"actors": min(processes.actors, len(settings))})
    pool = start_pool(task, (1.0,), processes)
    wait = Waiting(console or Console(highlight=False), "measuring", [bundle])
    results: list[Evaluation | None] = [None] * len(settings)
    places = {pool.step.remote(place, dict(setting), 0): place for place, setting in enumerate(settings)}
    left, up = list(places), False
    try:
        while left:
            ready, left = ray.wait(left, timeout=0.5)
            for reference in ready:
                results[places[reference]] = _evaluation(ray.get(reference))
                if progress:
                    progress(len(settings) - len(left), len(settings))
            up = up or ray.get(pool.up.remote())
            wait.poll(started=up)
    except ray.exceptions.RayError as error:
        raise JobError(f"measuring failed: {reason(error)}") from error
    finally:
        ray.kill(pool)
    return [evaluation for evaluation in results if evaluation is not None]


def _evaluation(found: Mapping[str, str]) -> Evaluation:
    if found.get("refused") == InputError.__name__:
        raise InputError(found["error"])
    if "error" in found:
        raise JobError(found["error"] if "refused" in found else f"measuring failed: {found['error']}")
    return Tried.model_validate_json(found["tried"]).rungs[-1]

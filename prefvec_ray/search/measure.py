"""Many settings measured at once: a few actors, each with its own live model, share a list of settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util import ActorPool

from prefvec_ray.cluster import reason
from prefvec_ray.errors import InputError, JobError
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.evaluation.evaluate import shares_batch
from prefvec_ray.search.trial import DEATHS, Task


class _Measurer:
    def __init__(self, task: Task) -> None:
        self.evaluator = task.evaluator()

    def measure(self, settings: Sequence[Mapping[str, float]]) -> list[str]:
        return [evaluation.model_dump_json() for evaluation in self.evaluator.evaluate_many(settings)]


def measure(
    task: Task,
    settings: Sequence[Mapping[str, float]],
    *,
    actors: int = 4,
    resources: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate every setting of `task.vectors`, in the order given, on up to `actors` processes of the
    cluster.

    What a setting scores does not depend on which actor measures it, or after what. `resources` of one
    actor, default one CPU. `progress(done, total)` is called after each setting. An actor that dies begins
    anew with what it was measuring.

    Raises:
        InputError: as `Evaluator` and its scorer.
        JobError: the scorer raised something else, or an actor died again and again; says what.
    """
    wanted = dict(resources or {"cpu": 1})
    actor: Any = ray.remote(_Measurer)
    options: dict[str, Any] = {"num_cpus": wanted.pop("cpu", 0), "num_gpus": wanted.pop("gpu", 0), "resources": wanted}
    options |= {"max_restarts": DEATHS, "max_task_retries": DEATHS}
    shared = ray.put(task)
    pool = ActorPool([actor.options(**options).remote(shared) for _ in range(min(actors, len(settings)))])
    # Small settings go several at a time: they may share a batch (`Evaluator.evaluate_many`).
    small = shares_batch(len(task.prompts), task.draws, task.batch_size)
    size = max(1, min(8, len(settings) // (2 * actors))) if small else 1
    parts = [list(settings[i : i + size]) for i in range(0, len(settings), size)]
    results: list[Evaluation] = []
    try:
        for texts in pool.map(lambda actor, part: actor.measure.remote(part), parts):
            results += [Evaluation.model_validate_json(text) for text in texts]
            if progress:
                progress(len(results), len(settings))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | JobError):
            raise error.cause from error
        raise JobError(f"measuring failed: {reason(error)}") from error
    except ray.exceptions.RayError as error:
        raise JobError(f"measuring failed: {reason(error)}") from error
    return results

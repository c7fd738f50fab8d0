"""Many settings measured at once: a few processes, each with its own live model, share a list of settings."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.pool import share
from prefvec_ray.common.scheduling import bundle_of
from prefvec_ray.evaluation.evaluate import shares_batch
from prefvec_ray.search.options import Processes
from prefvec_ray.search.trial import Task

Setting = Mapping[str, float]


class _Measurer:
    def __init__(self, task: Task) -> None:
        self.task = task

    def load(self) -> None:
        self.evaluator = self.task.evaluator()

    def work(self, settings: Sequence[Setting]) -> list[str]:
        return [evaluation.model_dump_json() for evaluation in self.evaluator.evaluate_many(settings)]


def measure(
    task: Task,
    settings: Sequence[Setting],
    processes: Processes,
    *,
    progress: Callable[[int, int], None] | None = None,
    console: Console | None = None,
) -> list[Evaluation]:
    """Evaluate every setting of `task.vectors`, in the order given, on processes of the cluster (`common.pool.share`).

    What a setting scores does not depend on which process measures it, or after what. `progress(done, total)` is called
    after each setting.

    Raises:
        InputError: as `Evaluator` and its scorer; a process that the cluster can never hold.
        JobError: the scorer raised something else, or processes died again and again.
    """
    task.check()
    # Small settings go several at a time: they may share a batch (`Evaluator.evaluate_many`).
    small = shares_batch(len(task.prompts), task.sampling.samples_per_prompt, task.batch_size)
    size = max(1, min(8, len(settings) // (2 * processes.actors))) if small else 1
    parts = [list(settings[i : i + size]) for i in range(0, len(settings), size)]
    results: dict[int, list[Evaluation]] = {}
    bundle = bundle_of(processes.resources)
    for place, texts in share(
        _Measurer, task, parts, processes=processes.actors, bundle=bundle, doing="measuring", console=console
    ):
        results[place] = [Evaluation.model_validate_json(text) for text in texts]
        if progress:
            progress(sum(map(len, results.values())), len(settings))
    return [evaluation for place in range(len(parts)) for evaluation in results[place]]

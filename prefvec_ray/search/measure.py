"""Many settings measured at once: a few actors, each with its own live model, share a list of settings."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.cluster import raise_cause, reason
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.scheduling import Waiting, actor_options, bundle_of, check_room
from prefvec_ray.evaluation.evaluate import shares_batch
from prefvec_ray.search.options import Processes
from prefvec_ray.search.trial import DEATHS, Task

Setting = Mapping[str, float]


class _Measurer:
    def __init__(self, task: Task) -> None:
        self.task = task

    def load(self) -> None:
        """Apart from construction, so that what it raises arrives as it is."""
        self.evaluator = self.task.evaluator()

    def measure(self, settings: Sequence[Setting]) -> list[str]:
        return [evaluation.model_dump_json() for evaluation in self.evaluator.evaluate_many(settings)]


def measure(
    task: Task,
    settings: Sequence[Setting],
    processes: Processes,
    *,
    progress: Callable[[int, int], None] | None = None,
    console: Console | None = None,
) -> list[Evaluation]:
    """Evaluate every setting of `task.vectors`, in the order given, on processes of the cluster.

    As many processes measure as the cluster has room for, and one is enough. More start as room comes free, and a
    process that is lost is replaced where there is room. What a setting scores does not depend on which process
    measures it, or after what. `progress(done, total)` is called after each setting. Where there is no room, `console`
    says what is missing (default: standard output).

    Raises:
        InputError: as `Evaluator` and its scorer; a process that the cluster can never hold.
        JobError: the scorer raised something else, or processes died again and again.
    """
    task.check()
    bundle = bundle_of(processes.resources)
    check_room("a process that measures", [bundle])
    # Small settings go several at a time: they may share a batch (`Evaluator.evaluate_many`).
    small = shares_batch(len(task.prompts), task.sampling.samples_per_prompt, task.batch_size)
    size = max(1, min(8, len(settings) // (2 * processes.actors))) if small else 1
    parts = [_Part(i, list(settings[i : i + size])) for i in range(0, len(settings), size)]
    pool = _Pool(ray.put(task), bundle, parts, min(processes.actors, len(parts)))
    wait = Waiting(console or Console(highlight=False), "measuring", [bundle])
    results: list[Evaluation | None] = [None] * len(settings)
    done = 0
    try:
        with raise_cause(InputError, JobError):
            while pool.unfinished:
                for part, texts in pool.step():
                    for i, text in enumerate(texts, part.first):
                        results[i] = Evaluation.model_validate_json(text)
                    done += len(texts)
                    if progress:
                        progress(done, len(settings))
                wait.poll(started=pool.working)
    except ray.exceptions.RayError as error:
        raise JobError(f"measuring failed: {reason(error)}") from error
    finally:
        pool.stop()
    return [evaluation for evaluation in results if evaluation is not None]


@dataclass
class _Part:
    """Settings that go to one process together; `first` is the place of the first of them."""

    first: int
    settings: list[Setting]
    deaths: int = 0


class _Pool:
    """Actors that take parts from a queue once they are up; one without room waits until there is some."""

    def __init__(self, task: Any, bundle: Mapping[str, float], parts: Sequence[_Part], actors: int) -> None:
        # An actor that dies is replaced here, not by Ray, whose restart would hold its part until there is room again.
        self._make = lambda: ray.remote(_Measurer).options(**actor_options(bundle), max_restarts=0).remote(task)
        self._queue = deque(parts)
        self._loading = _Part(-1, [])
        self._running: dict[Any, tuple[Any, _Part]] = {}
        for _ in range(actors):
            self._start()

    @property
    def working(self) -> bool:
        return any(part is not self._loading for _, part in self._running.values())

    @property
    def unfinished(self) -> bool:
        return bool(self._queue) or self.working

    def step(self) -> list[tuple[_Part, list[str]]]:
        """Wait up to half a second; what has been measured since."""
        found = []
        ready, _ = ray.wait(list(self._running), timeout=0.5)
        for reference in ready:
            actor, part = self._running.pop(reference)
            try:
                texts = ray.get(reference)
            except ray.exceptions.RayActorError:  # its process or node was lost
                part.deaths += 1
                if part.deaths > DEATHS:
                    raise
                if part is not self._loading:
                    self._queue.appendleft(part)
                self._start()
                continue
            if part is not self._loading:
                found.append((part, texts))
            if self._queue:
                part = self._queue.popleft()
                self._running[actor.measure.remote(part.settings)] = actor, part
            else:
                ray.kill(actor)
        return found

    def stop(self) -> None:
        """End the actors; also those that never found room."""
        for actor, _ in self._running.values():
            ray.kill(actor)

    def _start(self) -> None:
        actor = self._make()
        self._running[actor.load.remote()] = actor, self._loading

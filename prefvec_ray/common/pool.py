"""A list of work that processes of the cluster share: as many as there is room for, and one is enough."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray
from rich.console import Console

from prefvec_ray.common.cluster import raise_cause, reason
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.scheduling import Bundle, Waiting, actor_options, check_room

DEATHS = 2
"""So often a part is begun again whose process died, before the whole work fails."""

P = TypeVar("P", contravariant=True)
R = TypeVar("R", covariant=True)


class Worker(Protocol[P, R]):
    """What runs in a process. Its class is called with the task."""

    def load(self) -> None:
        """Once, before any work; apart from construction, so that what it raises arrives as it is."""

    def work(self, part: P, /) -> R: ...


def share(
    worker: type[Worker[P, R]],
    task: object,
    parts: Sequence[P],
    *,
    processes: int,
    bundle: Bundle,
    doing: str,
    console: Console | None = None,
) -> Iterator[tuple[int, R]]:
    """`worker.work` of every part, as (its place in `parts`, the result), in the order in which they are finished.

    At most `processes` work at once, each with the resources of `bundle`. More start as room comes free, and one that
    is lost is replaced where there is room. Where there is none, `console` says what is missing (default: standard
    output).

    Args:
        worker: its objects stay loaded and take one part after another.
        doing: for messages, such as "measuring".

    Raises:
        InputError: a process that the cluster can never hold; what a worker raises as such.
        JobError: a worker raised anything else, or processes died again and again.
    """
    check_room(f"a process for {doing}", [bundle])
    pool = _Pool(worker, ray.put(task), bundle, parts, processes)
    wait = Waiting(console or Console(highlight=False), doing, [bundle])
    try:
        with raise_cause(InputError, JobError):
            while pool.unfinished:
                yield from pool.step()
                wait.poll(started=pool.working)
    except ray.exceptions.RayError as error:
        raise JobError(f"{doing} failed: {reason(error)}") from error
    finally:
        pool.stop()


C = TypeVar("C")


@dataclass
class _Part(Generic[C]):
    place: int
    content: C
    deaths: int = 0


class _Pool(Generic[P, R]):
    """Actors that take parts from a queue once they are up; one without room waits until there is some."""

    def __init__(
        self, worker: type[Worker[P, R]], task: Any, bundle: Mapping[str, float], parts: Sequence[P], processes: int
    ) -> None:
        # An actor that dies is replaced here, not by Ray, whose restart would hold its part until there is room again.
        self._make = lambda: ray.remote(worker).options(**actor_options(bundle), max_restarts=0).remote(task)
        self._queue = deque(_Part(place, content) for place, content in enumerate(parts))
        self._running: dict[Any, tuple[Any, _Part[P] | None]] = {}
        """By what Ray will answer; None: the actor is loading."""
        self._failed_starts = 0
        for _ in range(min(processes, len(parts))):
            self._start()

    @property
    def working(self) -> bool:
        return any(part for _, part in self._running.values())

    @property
    def unfinished(self) -> bool:
        return bool(self._queue) or self.working

    def step(self) -> list[tuple[int, R]]:
        """Wait up to half a second; what has been finished since."""
        found = []
        ready, _ = ray.wait(list(self._running), timeout=0.5)
        for reference in ready:
            actor, part = self._running.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError:  # its process or node was lost
                if self._deaths_of(part) > DEATHS:
                    raise
                if part:
                    self._queue.appendleft(part)
                self._start()
                continue
            if part:
                found.append((part.place, result))
            if self._queue:
                following = self._queue.popleft()
                self._running[actor.work.remote(following.content)] = actor, following
            else:
                ray.kill(actor)
        return found

    def stop(self) -> None:
        """End the actors; also those that never found room."""
        for actor, _ in self._running.values():
            ray.kill(actor)

    def _deaths_of(self, part: _Part[P] | None) -> int:
        """How often processes died with this part, or while they loaded; this time included."""
        if part is None:
            self._failed_starts += 1
            return self._failed_starts
        part.deaths += 1
        return part.deaths

    def _start(self) -> None:
        actor = self._make()
        self._running[actor.load.remote()] = actor, None

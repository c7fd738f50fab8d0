"""A stream whose replica died goes on: another replica answers the same job from its start, and what the caller has
heard already is left out. Answers depend on their request alone, so both say the same."""

from collections import defaultdict
from collections.abc import Sequence

from prefvec_ray.serving.engine import EngineError
from prefvec_ray.serving.job import Event


class Replay:
    """`fresh` passes on what is new of a job's events; after `again` the events of a second run are expected."""

    def __init__(self) -> None:
        self._told: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        self._heard: defaultdict[int, int] = defaultdict(int)
        """pieces of each answer in this run"""

    def again(self) -> None:
        self._heard.clear()

    def fresh(self, events: Sequence[Event]) -> list[Event]:
        """Raises EngineError where this run says something else than the one before: a draw or a greedy choice within
        rounding distance, which another batch may turn."""
        new = []
        for index, piece in events:
            told, place = self._told[index], self._heard[index]
            self._heard[index] += 1
            if place == len(told):
                told.append(piece.tokens)
                new.append((index, piece))
            elif told[place] != piece.tokens:
                raise EngineError("a replica died, and the answer cannot be continued as it began")
        return new

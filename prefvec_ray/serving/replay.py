"""A stream whose replica died goes on at another replica.

That one answers the same request from its start. What the caller has received already is left out, and given to the
engine as the answer's first tokens: a choice within rounding distance might fall otherwise. After them answers depend
on their request alone. They need not come in equal pieces.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefvec_ray.serving.engines.base import EngineError, OutputDelta
from prefvec_ray.serving.request import Event


@dataclass
class _Said:
    """How far an answer has come."""

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    logprobs: int = 0
    ended: bool = False

    def add(self, delta: OutputDelta) -> None:
        self.tokens += delta.tokens
        self.characters += len(delta.text)
        self.logprobs += len(delta.logprobs)
        self.ended = delta.finish_reason is not None


class Replay:
    """`fresh` passes on what is new of a request's events; after `again` the events of a second run are expected."""

    def __init__(self) -> None:
        self._told: defaultdict[int, _Said] = defaultdict(_Said)
        self._runs: defaultdict[int, _Said] | None = None
        """of the present run; None: it is the first, and all of it is new"""

    def again(self) -> None:
        self._runs = defaultdict(_Said)

    def tokens(self, answers: int) -> tuple[tuple[int, ...], ...]:
        """The tokens of each of so many answers, for the next run to begin with."""
        return tuple(tuple(self._told[index].tokens) for index in range(answers))

    def fresh(self, events: Sequence[Event]) -> list[Event]:
        """Raises EngineError where this run says something else than the one before."""
        new = []
        for index, delta in events:
            told = self._told[index]
            rest = delta if self._runs is None else _unsent(index, delta, told, self._runs[index])
            if rest.tokens or rest.text or (rest.finish_reason and not told.ended):
                told.add(rest)
                new.append((index, rest))
        return new


def _unsent(index: int, delta: OutputDelta, told: _Said, run: _Said) -> OutputDelta:
    place = len(run.tokens)
    known = told.tokens[place : place + len(delta.tokens)]
    if known != list(delta.tokens[: len(known)]):
        raise EngineError(
            f"a replica died, and answer {index} cannot be continued as it began: from token {place} {known} were told,"
            f" now {list(delta.tokens)}"
        )
    rest = OutputDelta(
        delta.text[max(0, told.characters - run.characters) :],
        delta.tokens[len(known) :],
        delta.finish_reason,
        delta.logprobs[max(0, told.logprobs - run.logprobs) :],
    )
    run.add(delta)
    return rest

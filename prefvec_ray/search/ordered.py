"""Results reach an explorer in the order of its proposals, so that a search does not depend on who finishes first."""

from collections import deque

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.search.explore import Explorer, Proposal
from prefvec_ray.search.result import FailedTrial, Tried


class Ordered:
    """An explorer with up to `window` proposals under way.

    Proposal n is made when the results up to n - window are known, and from these alone, whatever else has finished. So
    the same seed gives the same search on a cluster of any size and speed, as far as the scores are the same.

    Args:
        window: proposals ahead of the results that they are made from; as many can be measured at once.
    """

    def __init__(self, explorer: Explorer, window: int) -> None:
        self.explorer, self.window = explorer, window
        self._under_way: deque[int] = deque()
        self._results: dict[int, Tried | FailedTrial] = {}
        self._known_then: dict[int, int] = {}
        self._first = max((tried.order for tried in explorer.known), default=-1) + 1

    @property
    def over(self) -> bool:
        """Whether no proposal will come any more. One that is under way may fail, and the base is then tried again."""
        return self.explorer.closed or bool(self.explorer.ended and not self._under_way)

    @property
    def measured(self) -> int:
        """Settings measured or dropped so far; also those that the explorer does not know of yet."""
        return len(self.explorer.tried) + sum(isinstance(result, Tried) for result in self._results.values())

    @property
    def failures(self) -> int:
        return len(self.explorer.failed) + sum(isinstance(result, FailedTrial) for result in self._results.values())

    def order(self, number: int) -> int:
        """The place of a proposal in the whole search, what earlier runs measured included."""
        return self._first + number

    def propose(self) -> Proposal | None:
        """The next setting; None where the search has ended, or the result that it waits for is still under way."""
        if len(self._under_way) >= self.window and not self._take_in():
            return None
        proposal = self.explorer.propose()
        while proposal is None and self._take_in():  # a budget of answers may have room once the next result is known
            proposal = self.explorer.propose()
        if proposal is not None:
            self._under_way.append(proposal.number)
            self._known_then[proposal.number] = len(self.explorer.tried)
        return proposal

    def promising(self, number: int, rungs: list[Evaluation]) -> bool:
        """`Explorer.promising`, beside what was known when the setting was proposed."""
        return self.explorer.promising(rungs, among=self._known_then[number])

    def finish(self, number: int, result: Tried | FailedTrial) -> None:
        """Take in a setting that was measured, dropped, or failed."""
        self._results[number] = result
        while self.explorer.ended and self._take_in():
            pass

    def _take_in(self) -> bool:
        """Hand the explorer the next result in order; False where that one is still under way."""
        if not self._under_way or self._under_way[0] not in self._results:
            return False
        number = self._under_way.popleft()
        result = self._results.pop(number)
        if isinstance(result, Tried):
            self.explorer.finish(number, result)
        else:
            self.explorer.fail(number, result.coefficients, result.error)
        return True

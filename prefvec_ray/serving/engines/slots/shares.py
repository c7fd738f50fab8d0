"""How much of an engine each caller has had, so that the one that had least comes next.

The virtual token counter of Sheng et al. (arXiv 2401.00588, algorithm 2), counted in seconds of the engine. A caller
who returns after a pause begins at the least of those who are busy, less a small credit, so that it comes first:
nobody saves up a claim beyond that.
"""

from collections import Counter
from collections.abc import Sequence


class Shares:
    """Callers by name. `enter` and `leave` once for each request; not safe for threads by itself."""

    def __init__(self) -> None:
        self.credit = 0.0
        """seconds that a caller may be behind the others when it returns"""
        self._had: dict[str, float] = {}
        self._busy: Counter[str] = Counter()

    @property
    def busy(self) -> int:
        """Callers that have requests here."""
        return len(self._busy)

    def enter(self, caller: str) -> None:
        if not self._busy[caller]:
            self._had[caller] = max(self.had(caller), self._least() - self.credit)
        self._busy[caller] += 1

    def leave(self, caller: str) -> None:
        self._busy[caller] -= 1
        if not self._busy[caller]:
            del self._busy[caller]
        if not self._busy:
            self._had.clear()
        elif caller not in self._busy and self.had(caller) <= self._least() - self.credit:
            del self._had[caller]

    def charge(self, callers: Sequence[str], seconds: float) -> None:
        """The engine computed for these requests together, a caller's name once for each of its requests."""
        for caller in callers:
            if caller in self._busy:
                self._had[caller] += seconds / len(callers)

    def had(self, caller: str) -> float:
        """Seconds, less what it would have had while it was away."""
        return self._had.get(caller, 0.0)

    def _least(self) -> float:
        return min((self._had[caller] for caller in self._busy), default=0.0)

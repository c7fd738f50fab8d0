"""What one request takes of its caller's allowance, from its admission to its end: counted in this process, or by the
coordinator of several fronts (`serving/http/coordinator.py`)."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from prefvec_ray.serving.access.rates import Rates, Reservation
from prefvec_ray.serving.config import Allowance


class Usage(Protocol):
    """One request's. It ends by `end` where it was admitted, by `refuse` where it was not; call one of them, once."""

    counted: bool
    """whether its tokens count against a limit"""

    async def reserve(self, tokens: int) -> Mapping[str, str]:
        """Set the most that it may use aside. Returns the headers that tell its caller what is left.

        Raises ApiError: 429 where it does not fit now, 400 where it never will."""

    def end(self, used: int | None) -> None:
        """The request is over. `used`: the tokens of its prompts and answers; None: unknown, so the most that it may
        have used stays counted."""

    def refuse(self, tokens: int = 0) -> None:
        """The request gets no answer; `tokens` are charged for reading it."""


Usages = Callable[[str, Allowance], Awaitable[Usage]]
"""Begins a request of a caller. Raises ApiError(429) where its allowance of requests, or of tokens, is used up."""


class LocalUsage:
    """See `Usage`. Raises ApiError(429) as `Usages` does."""

    def __init__(self, rates: Rates, caller: str, allowance: Allowance):
        rates.request(caller, allowance)
        self._rates, self._caller, self._allowance = rates, caller, allowance
        self._place = rates.enter(caller, allowance)
        self._reservation: Reservation | None = None
        self.counted = allowance.counts_tokens

    async def reserve(self, tokens: int) -> Mapping[str, str]:
        self._reservation = self._rates.reserve(self._caller, self._allowance, tokens)
        return self._rates.headers(self._caller, self._allowance)

    def end(self, used: int | None) -> None:
        if used is not None and self._reservation is not None:
            self._reservation.settle(used)
        self._place.leave()

    def refuse(self, tokens: int = 0) -> None:
        self.end(0)
        if tokens:
            self._rates.charge(self._caller, self._allowance, tokens)


def local_usages() -> Usages:
    """Of one process: what its callers used before it started is not known."""
    rates = Rates()

    async def begin(caller: str, allowance: Allowance) -> Usage:
        return LocalUsage(rates, caller, allowance)

    return begin

"""How many tokens a replica has generated for each request, for callers that hang up before they receive them."""

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field

MOST_KEPT = 1000
"""requests that are remembered after their end"""
WAIT_SECONDS = 3.0
"""for a request that is being stopped"""


@dataclass
class Spending:
    """One request's."""

    tokens: int = 0
    """generated so far, over all of its answers"""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Nothing more is generated for this request."""
        self.ended.set()


class SpentTokens:
    """By the requests' ids. For use in one event loop."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Spending] = OrderedDict()

    def begin(self, request_id: str) -> Spending:
        """A request begins. One that begins again, because its stream moved here, goes on counting."""
        spending = self._requests.pop(request_id, None) or Spending()
        spending.ended.clear()
        self._requests[request_id] = spending
        if len(self._requests) > MOST_KEPT:
            ended = next((name for name, each in self._requests.items() if each.ended.is_set()), None)
            if ended is not None:
                del self._requests[ended]
        return spending

    async def of(self, request_id: str) -> int | None:
        """The request's tokens once it has ended, or after a few seconds; None: no such request is remembered."""
        spending = self._requests.get(request_id)
        if spending is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                await spending.ended.wait()
        return spending.tokens

"""How many tokens each job of a replica has had generated, for callers that hang up before they hear them."""

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field

MOST_KEPT = 1000
"""jobs that are remembered after their end"""
WAIT_SECONDS = 3.0
"""for a job that is being stopped"""


@dataclass
class Spending:
    """One job's."""

    tokens: int = 0
    """generated so far, over all of its answers"""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Nothing more is generated for this job."""
        self.ended.set()


class SpentTokens:
    """By the jobs' ids. For use in one event loop."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Spending] = OrderedDict()

    def begin(self, job: str) -> Spending:
        """A job resume_tokens. One that begins again, because a caller's stream moved here, counts on."""
        spending = self._jobs.pop(job, None) or Spending()
        spending.ended.clear()
        self._jobs[job] = spending
        if len(self._jobs) > MOST_KEPT:
            ended = next((name for name, each in self._jobs.items() if each.ended.is_set()), None)
            if ended is not None:
                del self._jobs[ended]
        return spending

    async def of(self, job: str) -> int | None:
        """The job's tokens once it has ended, or after a few seconds; None: no such job is remembered."""
        spending = self._jobs.get(job)
        if spending is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                await spending.ended.wait()
        return spending.tokens

"""Merged mode in vLLM: whose turn it is while the weights hold one set of coefficients."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from prefvec_ray.serving.engines.base import Coefficients


class WeightTurns:
    """Who may generate while the weights hold one set of coefficients.

    Requests of the setting in force run together. A turn lasts until rewriting the weights costs no more than `share`
    of the time; then, if another setting waits, no request joins any more, and when the last one has ended the oldest
    waiting setting is next. Unlike the slot engine's batches, running answers are never paused.
    """

    def __init__(self, switch: Callable[[Coefficients], Awaitable[None]], share: float):
        self._switch, self._share = switch, share
        self.switches = 0
        self.switch_seconds = 0.0
        """what the last one took"""
        self._current: Coefficients | None = None
        self._began = 0.0
        self._inside = 0
        self._switching: asyncio.Task[None] | None = None
        self._waiting: deque[tuple[Coefficients, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, coefficients: Coefficients) -> AsyncIterator[None]:
        """Wait for a turn of these coefficients, and have it. Raises what rewriting the weights raised."""
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((coefficients, admitted))
        self._go_on()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                self._inside -= 1  # cancelled in the moment of its admission
            self._waiting = deque(waits for waits in self._waiting if waits[1] is not admitted)
            self._go_on()
            raise
        try:
            yield
        finally:
            self._inside -= 1
            self._go_on()

    def _go_on(self) -> None:
        if self._switching or not self._waiting:
            return
        late = (time.monotonic() - self._began) * self._share >= self.switch_seconds
        others = any(wanted != self._current for wanted, _ in self._waiting)
        if not (late and others) or (self._inside == 0 and self._waiting[0][0] == self._current):
            self._admit()
        if self._inside == 0 and self._waiting:
            self._switching = asyncio.get_running_loop().create_task(self._change(self._waiting[0][0]))

    def _admit(self) -> None:
        for wanted, admitted in self._waiting:
            if wanted == self._current and not admitted.done():
                admitted.set_result(None)
                self._inside += 1
        self._waiting = deque(waits for waits in self._waiting if not waits[1].done())

    async def _change(self, wanted: Coefficients) -> None:
        self._current, began = None, time.monotonic()
        try:
            await self._switch(wanted)
        except Exception as error:
            for _, admitted in (waits for waits in self._waiting if waits[0] == wanted):
                if not admitted.done():
                    admitted.set_exception(error)
            self._waiting = deque(waits for waits in self._waiting if not waits[1].done())
        else:
            self._current, self._began = wanted, time.monotonic()
            self.switch_seconds = self._began - began
            self.switches += 1
            self._admit()
        finally:
            self._switching = None
        self._go_on()

"""Work that would hold up the event loop, done in a thread, callers in turn.

Each caller has at most one piece of work under way, and its others wait for that; so whoever sends a hundred expensive
requests delays their own, and anyone else waits for one of them at most.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


@dataclass
class _Line:
    """One caller's: who holds the lock has its work in the thread."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Turns:
    """One thread, shared by all callers. For use in one event loop."""

    def __init__(self, name: str = "turns") -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lines: dict[str, _Line] = {}

    async def run(self, caller: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises. Work that has begun goes on when whoever waits for it is cancelled, and until
        it ends it counts as its caller's turn."""
        line = self._lines.setdefault(caller, _Line())
        line.users += 1
        try:
            await line.lock.acquire()
        except BaseException:
            self._leave(caller, line)
            raise
        done = asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

        def end(_: object) -> None:
            line.lock.release()
            self._leave(caller, line)

        done.add_done_callback(end)
        return await asyncio.shield(done)

    def _leave(self, caller: str, line: _Line) -> None:
        line.users -= 1
        if not line.users:
            del self._lines[caller]

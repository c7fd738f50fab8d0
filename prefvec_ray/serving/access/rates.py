"""How much a caller may use: requests a minute, tokens a minute, tokens a day.

Counted in the memory of the front, which is one process: a front that is replaced (a new deployment) starts from zero.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.config import Allowance

MINUTE, DAY = 60.0, 86_400.0
BINS = 60
LONGEST_RETRY = 60.0
"""seconds that OpenAI's client waits by itself; for a longer wait it is told not to try"""


@dataclass
class _Bin:
    number: int
    amount: int = 0
    last: float = 0.0
    """when something was last added"""


class Window:
    """A sliding window: what was taken counts for `seconds` and at most one sixtieth longer, so that where every taking
    first sees that it fits, no stretch of `seconds` holds more than the limit."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._bins: deque[_Bin] = deque()

    def used(self, now: float) -> int:
        while self._bins and now >= self._end(self._bins[0]):
            self._bins.popleft()
        return sum(each.amount for each in self._bins)

    def wait(self, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` more fits under `limit`: 0 now, infinity never."""
        over = self.used(now) + amount - limit
        if amount > limit:
            return math.inf
        for each in self._bins:
            if over <= 0:
                break
            over -= each.amount
            if over <= 0:
                return min(self._end(each) - now, self._seconds)  # rounding would make it a little more
        return 0.0

    def add(self, amount: int, now: float) -> _Bin:
        """Count `amount`, without asking. The bin: for a correction later."""
        number = math.floor(now / self._seconds * BINS)
        if not self._bins or self._bins[-1].number != number:
            self._bins.append(_Bin(number))
        newest = self._bins[-1]
        newest.amount, newest.last = newest.amount + amount, now
        return newest

    def _end(self, each: _Bin) -> float:
        return each.last + self._seconds


@dataclass
class _Used:
    requests: Window = field(default_factory=lambda: Window(MINUTE))
    minute: Window = field(default_factory=lambda: Window(MINUTE))
    day: Window = field(default_factory=lambda: Window(DAY))
    at_once: int = 0
    """requests under way"""

    def windows(self, allowance: Allowance) -> list[tuple[Window, int, str]]:
        """The windows of tokens that this caller has limits for: window, limit, span."""
        pairs = ((self.minute, allowance.tokens_per_minute, "minute"), (self.day, allowance.tokens_per_day, "day"))
        return [(window, limit, span) for window, limit, span in pairs if limit is not None]


class Place:
    """One request under way, until `leave`."""

    def __init__(self, used: _Used):
        self._used: _Used | None = used
        used.at_once += 1

    def leave(self) -> None:
        """The request has ended. Once more changes nothing."""
        if self._used:
            self._used.at_once -= 1
            self._used = None


@dataclass
class Reservation:
    """Tokens set aside for one request, until what it really used is known."""

    tokens: int
    bins: tuple[_Bin, ...]

    def settle(self, used: int) -> None:
        """Replace what was set aside by what was used."""
        for each in self.bins:
            each.amount += used - self.tokens
        self.tokens = used


class Rates:
    """What every caller has used of its allowance. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._callers: dict[str, _Used] = {}

    def request(self, caller: str, allowance: Allowance) -> None:
        """Count one request. Raises ApiError(429) where the minute's are used up, or all tokens: then its body need
        not even be read."""
        now, used, limit = self._clock(), self._used(caller), allowance.requests_per_minute
        if limit is not None:
            wait = used.requests.wait(1, limit, now)
            if wait:
                raise self._exceeded(f"{limit} requests per minute", "requests", wait, caller, allowance)
            used.requests.add(1, now)
        for window, most, span in used.windows(allowance):
            if wait := window.wait(1, most, now):
                raise self._exceeded(f"{most} tokens per {span}", "tokens", wait, caller, allowance)

    def enter(self, caller: str, allowance: Allowance) -> Place:
        """A request begins. Raises ApiError(429) where as many are under way as the caller may have at once."""
        used, limit = self._used(caller), allowance.requests_at_once
        if limit is not None and used.at_once >= limit:
            message = f"{limit} of your requests are under way, the most at once; wait for one of them to end"
            headers = self.headers(caller, allowance) | {"retry-after": "1"}
            raise ApiError(429, message, code="too_many_at_once", kind="requests", headers=headers)
        return Place(used)

    def charge(self, caller: str, allowance: Allowance, tokens: int) -> None:
        """Count the work of a request that was refused, whether it fits or not."""
        now, used = self._clock(), self._used(caller)
        for window, _, _ in used.windows(allowance):
            window.add(tokens, now)

    def reserve(self, caller: str, allowance: Allowance, tokens: int) -> Reservation:
        """Set tokens aside. Raises ApiError: 429 where they do not fit now, 400 where they never will."""
        now, used = self._clock(), self._used(caller)
        windows = used.windows(allowance)
        for window, limit, span in windows:
            wait = window.wait(tokens, limit, now)
            if math.isinf(wait):
                raise ApiError(
                    400,
                    f"this request may use {tokens} tokens, more than the {limit} per {span} of this caller;"
                    " lower max_tokens or n, or shorten the prompt",
                    code="request_too_large",
                )
            if wait:
                raise self._exceeded(f"{limit} tokens per {span}", "tokens", wait, caller, allowance)
        return Reservation(tokens, tuple(window.add(tokens, now) for window, _, _ in windows))

    def headers(self, caller: str, allowance: Allowance) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers, for the limits that this caller has (tokens: those of the minute)."""
        now, used, headers = self._clock(), self._used(caller), {}
        for kind, window, limit in (
            ("requests", used.requests, allowance.requests_per_minute),
            ("tokens", used.minute, allowance.tokens_per_minute),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - window.used(now)))
                headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(window.wait(limit, limit, now))}s"
        return headers

    def _used(self, caller: str) -> _Used:
        return self._callers.setdefault(caller, _Used())

    def _exceeded(self, what: str, kind: str, wait: float, caller: str, allowance: Allowance) -> ApiError:
        seconds = math.ceil(wait)
        headers = self.headers(caller, allowance) | {"retry-after": str(seconds)}
        if wait > LONGEST_RETRY:
            headers["x-should-retry"] = "false"
        message = f"the limit of {what} is reached; try again in {seconds} s"
        return ApiError(429, message, code="rate_limit_exceeded", kind=kind, headers=headers)

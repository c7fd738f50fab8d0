"""Which requests run, and which batch comes next.

Requests wait until there is a row for them, then belong to the batch of their coefficients' group; batches take turns.
Nothing here is computed, and nothing is safe for threads by itself: `SlotEngine` holds a lock around these calls.
"""

import math
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llguidance import LLMatcher

from prefvec_ray.serving.engines.base import Emit, Request
from prefvec_ray.serving.engines.output import OutputState
from prefvec_ray.serving.engines.slots.cache import CacheLayout, SlotCache
from prefvec_ray.serving.engines.slots.shares import Shares
from prefvec_ray.serving.engines.slots.weights import WeightBackend

PASS_SECONDS = 0.01
"""Where there are several callers, prompts are computed in passes of about this length: everybody else waits for it."""
LEAST_PROMPT_TOKENS = 64
"""of such a pass, however slow the model is"""
ALONE_SECONDS = 60.0
"""A caller is alone once there was no other for so long: in the pauses between others' requests it is not."""
EARLY_SHARE = 0.25
"""The share of a turn that may go into rewriting the weights, where it ends early for the sake of a first token."""


@dataclass(eq=False)
class ScheduledRequest:
    """A submitted request, until its last delta has been emitted."""

    request: Request
    emit: Emit
    output: OutputState
    draws: random.Random
    """its random numbers"""
    matcher: LLMatcher | None = None
    """of the schema that its answer follows"""
    cancelled: bool = False
    passed: int = 0
    """younger requests that were admitted before it"""

    def cancel(self) -> None:
        """Stop working on it. Its row is free before the next step; nothing more is emitted."""
        self.cancelled = True


@dataclass
class Batch:
    """Running requests of one group: `rows[r]` owns row r of the cache; `joining` wait for their first pass."""

    cache: SlotCache
    rows: list[ScheduledRequest] = field(default_factory=list)
    joining: deque[ScheduledRequest] = field(default_factory=deque)
    long: deque[ScheduledRequest] = field(default_factory=deque)
    """with prompts that are computed in chunks, one prompt at a time"""
    partial: SlotCache | None = None
    """of the first of `long`: what is computed of its prompt"""
    rested: bool = True
    """the running rows have had a token since prompts were computed"""

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.joining) + len(self.long)

    def all(self) -> list[ScheduledRequest]:
        return [*self.rows, *self.without_token()]

    def without_token(self) -> list[ScheduledRequest]:
        """Those that wait for their first token."""
        return [*self.joining, *self.long]


class Scheduler:
    """See `SlotEngine` for the parameters."""

    def __init__(
        self, weights: WeightBackend, layout: CacheLayout, max_batch: int, switch_share: float, prefill_tokens: int
    ):
        self._weights, self._layout = weights, layout
        self._max_batch, self._switch_share, self._prefill_tokens = max_batch, switch_share, prefill_tokens
        self.waiting: deque[ScheduledRequest] = deque()
        self.cancelled = 0
        """requests that were dropped so far"""
        self._batches: OrderedDict[Hashable, Batch] = OrderedDict()
        """the first one's turn it is"""
        self._turn_began = self._pass_began = time.monotonic()
        self._shares = Shares()
        self._shared_at = -ALONE_SECONDS
        """when a request came last that found another caller here"""
        self._token_seconds = 0.0
        """that a prompt's token took lately"""

    @property
    def prompt_tokens(self) -> int:
        """Most prompt tokens of a pass: `prefill_tokens`, or what takes PASS_SECONDS where a caller is not alone."""
        alone = self._shares.busy < 2 and time.monotonic() - self._shared_at > ALONE_SECONDS
        if alone or self._token_seconds * self._prefill_tokens <= PASS_SECONDS:
            return self._prefill_tokens
        return min(self._prefill_tokens, max(LEAST_PROMPT_TOKENS, int(PASS_SECONDS / self._token_seconds)))

    @property
    def running(self) -> int:
        """Requests in batches."""
        return sum(batch.size for batch in self._batches.values())

    @property
    def cached_tokens(self) -> int:
        """Of the running rows, prompts and answers."""
        rows = [row for batch in self._batches.values() for row in batch.rows]
        return sum(len(row.request.prompt) + len(row.output.generated) for row in rows)

    def add(self, scheduled: ScheduledRequest) -> None:
        self.waiting.append(scheduled)
        self._shares.enter(scheduled.request.caller)
        if self._shares.busy > 1:
            self._shared_at = time.monotonic()

    def next_batch(self) -> Batch | None:
        """Drop what was cancelled, admit what fits, and begin a pass of the batch whose turn it is; None: no work."""
        self._drop_cancelled()
        self._admit()
        if not self._batches:
            return None
        self._pass_began = time.monotonic()
        return next(iter(self._batches.values()))

    def next_work(self, batch: Batch) -> Literal["prompts", "chunk", "token"]:
        """What the pass is for: joining prompts, the next part of a long one, or a token for every running row.

        Where the callers of the rows had less than those of the prompts, both go in turn. Otherwise joining prompts
        come first, since more rows share each pass afterwards."""
        running, joining, long = (
            min(map(self._had, line), default=math.inf) for line in (batch.rows, batch.joining, batch.long)
        )
        if batch.joining and joining <= long and (batch.rested or joining <= running):
            return "prompts"
        if batch.long and (batch.rested or not batch.rows):
            return "chunk"
        return "token"

    def next_prompts(self, batch: Batch) -> list[ScheduledRequest]:
        """Take the joining requests whose prompts are computed together: those of the callers that have had least."""
        taken: list[ScheduledRequest] = []
        width = 0
        for scheduled in sorted(batch.joining, key=self._had):
            width = max(width, len(scheduled.request.prompt))
            if taken and width * (len(taken) + 1) > self.prompt_tokens:
                break
            batch.joining.remove(scheduled)
            taken.append(scheduled)
        return taken

    def next_long(self, batch: Batch) -> ScheduledRequest:
        """The long prompt whose next chunk is computed: the one that was begun, else the caller's that had least."""
        if batch.partial is None:
            following = min(batch.long, key=self._had)
            batch.long.remove(following)
            batch.long.appendleft(following)
        return batch.long[0]

    def charge(self, computed: Sequence[ScheduledRequest], prompt_tokens: int = 0) -> None:
        """The pass is over; it was for these, and computed so many tokens of prompts, padding included."""
        seconds = time.monotonic() - self._pass_began
        self._shares.charge([each.request.caller for each in computed], seconds)
        if prompt_tokens:
            self._token_seconds += 0.2 * (seconds / prompt_tokens - self._token_seconds)

    def free(self, batch: Batch, row: int) -> None:
        """Row `row` has ended; the last row takes its place."""
        self._shares.leave(batch.rows[row].request.caller)
        last = batch.rows.pop()
        if row < len(batch.rows):
            batch.rows[row] = last
        batch.cache.free(row)

    def clear(self, batch: Batch) -> list[ScheduledRequest]:
        """Take all requests out of the batch, and whatever was computed for them."""
        taken = batch.all()
        for scheduled in taken:
            self._shares.leave(scheduled.request.caller)
        batch.rows, batch.joining, batch.long = [], deque(), deque()
        batch.cache, batch.partial = SlotCache(self._layout), None
        return taken

    def end_pass(self) -> None:
        """Drop the batch if it is empty, or end its turn if it has had its time: the caller that had least is next."""
        key, batch = next(iter(self._batches.items()))
        now = time.monotonic()
        switch = self._weights.switch_seconds
        self._shares.credit = switch / self._switch_share
        if not batch.size:
            del self._batches[key]
        elif (now - self._turn_began) * self._share_now(batch) >= switch:
            self._batches.move_to_end(key)
        else:
            return
        self._turn_began = now
        if self._batches:
            following = min(self._batches, key=lambda key: min(map(self._had, self._batches[key].all())))
            self._batches.move_to_end(following, last=False)

    def _share_now(self, batch: Batch) -> float:
        """The share of its turn that rewriting the weights may have taken, if the batch's turn is to end now: a larger
        one where a first token waits in another batch whose caller had less, by more than the rewriting takes."""
        others = [each for other in self._batches.values() if other is not batch for each in other.without_token()]
        least = min(map(self._had, batch.all())) - self._weights.switch_seconds
        urgent = any(self._had(each) <= least for each in others)
        return max(self._switch_share, EARLY_SHARE) if urgent else self._switch_share

    def drain(self) -> list[ScheduledRequest]:
        """Take everything, running and waiting."""
        taken = [scheduled for batch in self._batches.values() for scheduled in batch.all()] + list(self.waiting)
        self._batches.clear()
        self.waiting.clear()
        return taken

    def _drop_cancelled(self) -> None:
        for batch in self._batches.values():
            for row in reversed(range(len(batch.rows))):
                if batch.rows[row].cancelled:
                    self.free(batch, row)
                    self.cancelled += 1
            if batch.long and batch.long[0].cancelled:
                batch.partial = None
            self._discard_cancelled(batch.joining)
            self._discard_cancelled(batch.long)
        self._discard_cancelled(self.waiting)
        for key in [key for key, batch in self._batches.items() if not batch.size]:
            del self._batches[key]

    def _discard_cancelled(self, line: deque[ScheduledRequest]) -> None:
        for scheduled in [each for each in line if each.cancelled]:
            line.remove(scheduled)
            self._shares.leave(scheduled.request.caller)
            self.cancelled += 1

    def _admit(self) -> None:
        if not self.waiting:
            return
        running = Counter(each.request.caller for batch in self._batches.values() for each in batch.all())
        while self.waiting and running.total() < self._max_batch:
            scheduled = self._next_waiting(running)
            if scheduled is None:
                return
            self.waiting.remove(scheduled)
            scheduled.request.timeline.admitted = time.time_ns()
            batch = self._batches.setdefault(self._group(scheduled), Batch(SlotCache(self._layout)))
            long = len(scheduled.request.prompt) > self.prompt_tokens
            (batch.long if long else batch.joining).append(scheduled)
            running[scheduled.request.caller] += 1

    def _next_waiting(self, running: Mapping[str, int]) -> ScheduledRequest | None:
        """The oldest of the caller that had least and may have another row. Or, where that would need a batch of its
        own, the first of a caller that had no more and can join one which runs already: weights are rewritten less
        often, and more rows share each pass. Nobody is passed by many."""
        most = self._max_batch - self._max_batch // 8
        fit = [each for each in self.waiting if not (caller := each.request.caller) or running[caller] < most]
        if not fit:
            return None
        first = min(fit, key=self._had)
        if first.passed < self._max_batch // 4 and self._group(first) not in self._batches:
            for scheduled in fit:
                if self._group(scheduled) in self._batches and self._had(scheduled) <= self._had(first):
                    first.passed += 1
                    return scheduled
        return first

    def _had(self, scheduled: ScheduledRequest) -> float:
        return self._shares.had(scheduled.request.caller)

    def _group(self, scheduled: ScheduledRequest) -> Hashable:
        return self._weights.group(scheduled.request.coefficients)

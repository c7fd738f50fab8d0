"""The slot engine: continuous batching on a plain transformers model, every request at its own coefficients.

    engine = SlotEngine(MergedWeights(live), tokenizer, max_batch=32)
    ticket = engine.submit(request, emit=pieces.append)
    while engine.step(): ...

Each running request owns one row of a `SlotCache`; a new prompt joins between two steps of the others, a
finished row is freed at once. Two ways to hold coefficients: `MergedWeights` writes one set at a time into the
weights, so requests are kept in one batch per set, and the batches take turns; `SteeredWeights` adds every row's own
vectors beside the weights, so there is one batch for all.

`step` does all the work and is plain and synchronous. `start` runs it in a thread of its own, and `stream` is the
`Engine` protocol's asynchronous face of it.
"""

import logging
import random
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import (
    Coefficients,
    EngineError,
    EngineStatus,
    OutputDelta,
    Request,
    TokenLogprob,
)
from prefvec_ray.serving.engines.output import OVERFLOW, Emit, OutputState, check_request, end_tokens, stream_of
from prefvec_ray.serving.engines.sampling import choose, logprobs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.cache import SlotCache, context_length
from prefvec_ray.serving.engines.slots.shares import Shares
from prefvec_ray.serving.engines.slots.weights import WeightBackend
from prefvec_ray.serving.engines.text import TokenTexts
from prefvec_ray.vectors import PreferenceVector

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ScheduledRequest:
    """A submitted request, until its last piece has been emitted."""

    request: Request
    emit: Emit
    answer: OutputState
    draw: random.Random
    cancelled: bool = False
    passed: int = 0
    """younger requests that were admitted before it"""


@dataclass
class _Batch:
    """Running requests of one group: `tickets[r]` owns row r of the cache; `joining` wait for their first pass."""

    cache: SlotCache = field(default_factory=SlotCache)
    tickets: list[ScheduledRequest] = field(default_factory=list)
    joining: deque[ScheduledRequest] = field(default_factory=deque)
    long: deque[ScheduledRequest] = field(default_factory=deque)
    """with prompts that are computed in chunks, one prompt at a time"""
    partial: SlotCache | None = None
    """of the first of `long`: what is computed of its prompt"""
    rested: bool = True
    """the running rows have had a token since the last chunk"""

    @property
    def size(self) -> int:
        return len(self.tickets) + len(self.joining) + len(self.long)

    def all(self) -> list[ScheduledRequest]:
        return [*self.tickets, *self.joining, *self.long]

    def clear(self) -> None:
        self.tickets, self.joining, self.long = [], deque(), deque()
        self.cache, self.partial = SlotCache(), None


class SlotEngine:
    """Continuous batching over the rows of `SlotCache`s.

    max_batch: most requests that run at once, over all batches; the others wait. Callers that have had least of the
        engine come first (`Shares`), and of one caller its oldest request, but that up to max_batch / 4 others may join
        running requests of their own setting first. A caller that is named never has the last eighth of the rows.
    switch_share: in merged mode, the share of time that may go into rewriting the weights while several sets of
        coefficients take turns. Smaller: longer turns, more tokens a second, longer pauses within each answer.
    prefill_tokens: most prompt tokens (padding included) computed between two steps; a longer prompt goes alone, in
        chunks, between which the running requests have their tokens.

    Raises InputError for models whose cache is not keys and values by position.
    """

    def __init__(
        self,
        weights: WeightBackend,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 32,
        switch_share: float = 0.1,
        prefill_tokens: int = 2048,
    ):
        self.model = weights.model.eval()
        self.context = context_length(self.model.config)
        self.max_batch, self.switch_share, self.prefill_tokens = max_batch, switch_share, prefill_tokens
        self._weights, self._tokenizer = weights, tokenizer
        self._device = self.model.device
        self._additive = _wants_additive_mask(self.model)
        self._ends = end_tokens(self.model.generation_config, tokenizer)
        self._token_texts = TokenTexts(tokenizer)
        self._batches: OrderedDict[Hashable, _Batch] = OrderedDict()
        self._turn_began = self._pass_began = time.monotonic()
        self._waiting: deque[ScheduledRequest] = deque()
        self._shares = Shares()
        self._changes: deque[tuple[Mapping[str, PreferenceVector], Future[None]]] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._finished = self._cancelled = self._failed = self._tokens = 0

    def check(self, request: Request) -> None:
        """See `Engine.check`."""
        check_request(request, self.model.get_input_embeddings().weight.shape[0], self.context)

    def submit(self, request: Request, emit: Emit) -> ScheduledRequest:
        """Queue a request. `emit` is called from the engine's thread with every piece, or once with what went wrong.

        Raises InputError as `check` does, and EngineError where the engine is closed.
        """
        self.check(request)
        answer = OutputState(request, self._tokenizer, self._ends)
        ticket = ScheduledRequest(request, emit, answer, random.Random(request.random_key()))
        with self._news:
            if self._closed:
                raise EngineError("the engine is closed")
            self._waiting.append(ticket)
            self._shares.enter(request.caller)
            self._news.notify()
        return ticket

    def cancel(self, ticket: ScheduledRequest) -> None:
        """Stop working on a request. Its row is free before the next step; nothing more is emitted."""
        with self._news:
            ticket.cancelled = True
            self._news.notify()

    def change(self, vectors: Mapping[str, PreferenceVector]) -> "Future[None]":
        """See `Engine.change`."""
        changed: Future[None] = Future()
        with self._news:
            if self._closed:
                raise EngineError("the engine is closed")
            self._changes.append((vectors, changed))
            self._news.notify()
        return changed

    def status(self) -> EngineStatus:
        with self._news:
            running = sum(batch.size for batch in self._batches.values())
            return EngineStatus(
                running=running,
                waiting=len(self._waiting),
                finished=self._finished,
                cancelled=self._cancelled,
                failed=self._failed,
                tokens=self._tokens,
                merges=self._weights.merges,
            )

    # --- the loop ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what fits, then give every row of the batch whose turn it is one more token. False: nothing to do."""
        while self._changes:
            self._change(*self._changes.popleft())
        with self._news:
            self._drop_cancelled()
            self._admit()
        if not self._batches:
            return False
        key, batch = next(iter(self._batches.items()))
        self._pass_began = time.monotonic()
        try:
            if batch.joining:
                self._prefill(batch)
            elif batch.long and (batch.rested or not batch.tickets):
                self._prefill_chunk(batch)
            elif batch.tickets:
                self._decode(batch)
        except InputError as error:  # coefficients that make a weight overflow
            self._fail(batch, error)
        except Exception as error:  # one batch's failure (out of memory, say) must not take the others with it
            log.exception("a batch of %d requests failed", batch.size)
            self._fail(batch, EngineError(f"the engine failed: {type(error).__name__}"))
        self._end_turn(key, batch)
        return True

    @torch.inference_mode(False)  # what is built here lives on
    def _change(self, vectors: Mapping[str, PreferenceVector], changed: "Future[None]") -> None:
        try:
            self._weights.change(vectors)
        except Exception as error:
            changed.set_exception(error)
        else:
            changed.set_result(None)

    def _drop_cancelled(self) -> None:
        for batch in self._batches.values():
            for row in reversed(range(len(batch.tickets))):
                if batch.tickets[row].cancelled:
                    self._free(batch, row)
                    self._cancelled += 1
            self._discard_cancelled(batch.joining)
            if batch.long and batch.long[0].cancelled:
                batch.partial = None
            self._discard_cancelled(batch.long)
        self._discard_cancelled(self._waiting)
        for key in [key for key, batch in self._batches.items() if not batch.size]:
            del self._batches[key]

    def _discard_cancelled(self, tickets: deque[ScheduledRequest]) -> None:
        gone = [ticket for ticket in tickets if ticket.cancelled]
        for ticket in gone:
            tickets.remove(ticket)
            self._shares.leave(ticket.request.caller)
        self._cancelled += len(gone)

    def _admit(self) -> None:
        if not self._waiting:
            return
        running = Counter(ticket.request.caller for batch in self._batches.values() for ticket in batch.all())
        while self._waiting and running.total() < self.max_batch:
            ticket = self._next_waiting(running)
            if ticket is None:
                return
            self._waiting.remove(ticket)
            batch = self._batches.setdefault(self._weights.group(ticket.request.coefficients), _Batch())
            long = len(ticket.request.prompt) > self.prefill_tokens
            (batch.long if long else batch.joining).append(ticket)
            running[ticket.request.caller] += 1

    def _next_waiting(self, running: Mapping[str, int]) -> ScheduledRequest | None:
        """The oldest of the caller that had least and may have another row. Or, where that would need a batch of its
        own, the first of a caller that had no more and can join one which runs already: weights are rewritten less
        often, and more rows share each pass. Nobody is passed by many."""
        most = self.max_batch - self.max_batch // 8
        fit = [ticket for ticket in self._waiting if not (caller := ticket.request.caller) or running[caller] < most]
        if not fit:
            return None
        first = min(fit, key=self._had)
        if first.passed < self.max_batch // 4 and not self._runs(first):
            for ticket in fit:
                if self._runs(ticket) and self._had(ticket) <= self._had(first):
                    first.passed += 1
                    return ticket
        return first

    def _had(self, ticket: ScheduledRequest) -> float:
        return self._shares.had(ticket.request.caller)

    def _runs(self, ticket: ScheduledRequest) -> bool:
        return self._weights.group(ticket.request.coefficients) in self._batches

    def _prefill(self, batch: _Batch) -> None:
        """Compute the prompts of the next joining requests, and their first token."""
        new: list[ScheduledRequest] = []
        width = 0
        for ticket in sorted(batch.joining, key=self._had):
            wider = max(width, len(ticket.request.prompt))
            if new and wider * (len(new) + 1) > self.prefill_tokens:
                break
            batch.joining.remove(ticket)
            new.append(ticket)
            width = wider
        lengths = [len(t.request.prompt) for t in new]
        batch.tickets += new
        ids_RT = torch.zeros(len(new), width, dtype=torch.long)
        for row, ticket in enumerate(new):
            ids_RT[row, : lengths[row]] = torch.tensor(ticket.request.prompt)
        positions_RT, mask = batch.cache.begin_prefill(lengths, self._device)
        ends = sorted({length - 1 for length in lengths})
        logits_REV = self._forward(new, ids_RT, positions_RT, mask, batch.cache, torch.tensor(ends))
        place_R = torch.tensor([ends.index(length - 1) for length in lengths], device=self._device)
        logits_RV = logits_REV[torch.arange(len(new), device=self._device), place_R]
        self._advance(batch, len(batch.tickets) - len(new), logits_RV)

    def _prefill_chunk(self, batch: _Batch) -> None:
        """Compute the next part of a long prompt; at its end its row joins the others, with its first token."""
        batch.rested = False
        ticket = batch.long[0]
        prompt = ticket.request.prompt
        if batch.partial is None:  # an empty cache is false
            batch.partial = SlotCache(rows=1)
        start = batch.partial.get_seq_length()
        # A chunk's mask has four times the numbers of that of a whole prompt of `prefill_tokens` at most, or one row's.
        width = min(len(prompt) - start, self.prefill_tokens, max(1, 4 * self.prefill_tokens**2 // len(prompt)))
        ids_1T = torch.tensor([prompt[start : start + width]])
        positions_1T, mask = batch.partial.begin_chunk(width, self._device)
        logits_1EV = self._forward([ticket], ids_1T, positions_1T, mask, batch.partial, torch.tensor([width - 1]))
        if start + width == len(prompt):
            batch.cache.take(batch.partial)
            batch.partial = None
            batch.tickets.append(batch.long.popleft())
            self._advance(batch, len(batch.tickets) - 1, logits_1EV[:, 0])
        else:
            logits_1EV.sum().item()  # the pass is over when this is known
            self._charge([ticket])

    def _decode(self, batch: _Batch) -> None:
        batch.rested = True
        ids_R1 = torch.tensor([[t.answer.last_token] for t in batch.tickets])
        positions_R1, mask = batch.cache.begin_decode(self._device)
        logits_R1V = self._forward(batch.tickets, ids_R1, positions_R1, mask, batch.cache, torch.tensor([0]))
        self._advance(batch, 0, logits_R1V[:, 0])

    def _forward(
        self,
        tickets: list[ScheduledRequest],
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: SlotCache,
        keep: Tensor,
    ) -> Tensor:
        """Logits (rows, kept positions, vocabulary) in fp32."""
        self._weights.apply([t.request.coefficients for t in tickets])
        if self._additive:
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)
        out = self.model(
            input_ids=ids.to(self._device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep.to(self._device),
        )
        return out.logits.float()

    def _advance(self, batch: _Batch, first: int, logits_RV: Tensor) -> None:
        """Give the rows from `first` on their next token, and free those that are done."""
        tickets = batch.tickets[first:]
        sound = torch.isfinite(logits_RV.amax(-1)).tolist()  # the largest is NaN where any is
        if not all(sound):
            logits_RV = torch.nan_to_num(logits_RV)
        chosen = choose(logits_RV, [t.request.sampling for t in tickets], [t.draw for t in tickets])
        chosen = [
            t.request.resume_tokens[t.answer.produced] if t.answer.produced < len(t.request.resume_tokens) else token
            for t, token in zip(tickets, chosen, strict=True)
        ]
        likely = self._likely(tickets, logits_RV, chosen)
        said = [
            ticket.answer.push(token, told) if fine else InputError(OVERFLOW)
            for ticket, token, told, fine in zip(tickets, chosen, likely, sound, strict=True)
        ]
        with self._news:
            self._charge(tickets)
            self._tokens += sum(sound)
            for row in reversed(range(len(tickets))):
                piece = said[row]
                if isinstance(piece, InputError):
                    self._failed += 1
                    self._free(batch, first + row)
                elif piece and piece.finish_reason:
                    self._finished += 1
                    self._free(batch, first + row)
        # Told last: who has its answer finds its row free and itself counted.
        for ticket, piece in zip(tickets, said, strict=True):
            if piece:
                ticket.emit(piece)

    def _likely(
        self, tickets: list[ScheduledRequest], logits_RV: Tensor, chosen: list[int]
    ) -> list[tuple[TokenLogprob, ...] | None]:
        """For each row that asks for log-probabilities: the chosen token, then the likeliest."""
        likely: list[tuple[TokenLogprob, ...] | None] = [None] * len(tickets)
        rows = [row for row, ticket in enumerate(tickets) if ticket.request.sampling.logprobs is not None]
        if rows:
            tops = [tickets[row].request.sampling.logprobs or 0 for row in rows]
            told = logprobs(logits_RV[rows], [chosen[row] for row in rows], tops)
            for row, pairs in zip(rows, told, strict=True):
                likely[row] = tuple(TokenLogprob(*self._token_texts[token], value) for token, value in pairs)
        return likely

    def _charge(self, tickets: list[ScheduledRequest]) -> None:
        """A pass over these is over."""
        self._shares.charge([t.request.caller for t in tickets], time.monotonic() - self._pass_began)

    def _free(self, batch: _Batch, row: int) -> None:
        self._shares.leave(batch.tickets[row].request.caller)
        last = batch.tickets.pop()
        if row < len(batch.tickets):
            batch.tickets[row] = last
        batch.cache.free(row)

    def _fail(self, batch: _Batch, error: Exception) -> None:
        self._weights.forget()
        tickets = batch.all()
        batch.clear()
        with self._news:
            self._failed += len(tickets)
            for ticket in tickets:
                self._shares.leave(ticket.request.caller)
        for ticket in tickets:
            ticket.emit(error)

    def _end_turn(self, key: Hashable, batch: _Batch) -> None:
        """One that is empty goes, one that has had its time goes to the end; the next is that of whoever had least."""
        with self._news:
            now = time.monotonic()
            if not batch.size:
                del self._batches[key]
            elif (now - self._turn_began) * self.switch_share >= self._weights.switch_seconds:
                self._batches.move_to_end(key)
            else:
                return
            self._turn_began = now
            if self._batches:
                following = min(self._batches, key=lambda key: min(map(self._had, self._batches[key].all())))
                self._batches.move_to_end(following, last=False)

    # --- in a thread, for asynchronous callers ----------------------------------------------------------------------

    def start(self) -> "SlotEngine":
        """Run the loop in a thread until `close`. Returns self."""
        self._thread = threading.Thread(target=self._run, name="slot-engine", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    with self._news:
                        self._news.wait_for(lambda: self._closed or self._waiting or self._changes)
        finally:  # also where the loop itself broke: nobody may wait for an answer that will not come
            self._end()

    def warm_up(self, coefficients: Coefficients) -> None:
        """Generate one token before `start`, so that an engine which reports ready has answered."""
        seen: list[OutputDelta | Exception] = []
        self.submit(Request((0,), coefficients, SamplingParams(max_tokens=1)), seen.append)
        while self.step():
            pass
        if isinstance(seen[0], Exception):
            raise seen[0]

    def check_alive(self) -> None:
        """See `Engine.check_alive`."""
        if self._closed or self._thread is None or not self._thread.is_alive():
            raise EngineError("the engine's loop is not running")

    def close(self) -> None:
        """See `Engine.close`."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread:
            self._thread.join()
        else:
            self._end()

    def _end(self) -> None:
        with self._news:
            self._closed = True
            tickets = [ticket for batch in self._batches.values() for ticket in batch.all()]
            tickets += self._waiting
            self._waiting.clear()
            self._batches.clear()
            changes, self._changes = self._changes, deque()
        for ticket in tickets:
            ticket.emit(EngineError("the engine was closed"))
        for _, changed in changes:
            changed.set_exception(EngineError("the engine was closed"))

    def stream(self, request: Request) -> AsyncIterator[OutputDelta]:
        """See `Engine.stream`. Needs `start`."""
        return stream_of(lambda emit: self.submit(request, emit), self.cancel)


def _wants_additive_mask(model: PreTrainedModel) -> bool:
    """How the model's attention reads a 4-D mask: True for added numbers, False for booleans."""
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise InputError(
            f"attention implementation '{kind}': load the model with attn_implementation='sdpa' or 'eager'"
        )
    return bool(kind == "eager")

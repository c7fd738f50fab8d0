"""The slot engine: continuous batching on a plain transformers model, every request at its own coefficients.

    engine = SlotEngine(MergedWeights(live), tokenizer, max_batch=32)
    engine.submit(request, emit=deltas.append)
    while engine.step(): ...

Each running request owns one row of a `SlotCache`; a new prompt joins between two steps of the others, a
finished row is freed at once. There are two ways to hold coefficients. `MergedWeights` writes one set at a time into
the weights, so requests are kept in one batch per set, and the batches take turns. `SteeredWeights` adds every row's
own vectors beside the weights, so there is one batch for all.

`step` does all the work and is plain and synchronous. `start` runs it in a thread of its own. Which requests run, and
which batch comes next, is decided in `scheduler.py`.
"""

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future

import torch
from llguidance import LLMatcher
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.chat import end_tokens
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import Emit, EngineError, EngineStatus, OutputDelta, Request, TokenLogprob
from prefvec_ray.serving.engines.grammar import TOO_COMPLEX, Grammars, masked
from prefvec_ray.serving.engines.output import OVERFLOW, OutputState, check_request
from prefvec_ray.serving.engines.sampling import adjusted, choose, logprobs
from prefvec_ray.serving.engines.slots.cache import CacheLayout, Masks, SlotCache, context_length
from prefvec_ray.serving.engines.slots.scheduler import Batch, ScheduledRequest, Scheduler
from prefvec_ray.serving.engines.slots.weights import WeightBackend
from prefvec_ray.serving.engines.text import TokenTexts
from prefvec_ray.vectors import PreferenceVector

log = logging.getLogger(__name__)


class SlotEngine:
    """Continuous batching over the rows of `SlotCache`s.

    max_batch: most requests that run at once, over all batches; the others wait. Callers that have had least of the
        engine come first (`Shares`), and of one caller its oldest request, but that up to max_batch / 4 others may join
        running requests of their own setting first. A caller that is named never has the last eighth of the rows.
    switch_share: in merged mode, the share of time that may go into rewriting the weights while several sets of
        coefficients take turns. Smaller: longer turns, more tokens a second, longer pauses within each answer. A first
        token of a caller that had less ends a turn early, once a quarter of the turn went into it.
    prefill_tokens: most prompt tokens (padding included) computed between two steps; a longer prompt goes alone, in
        chunks, between which the running requests have their tokens. Where several callers were here within the last
        minute, as many as are computed in about 10 ms, if that is fewer.

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
        stream_interval: int = 1,
    ):
        self.model = weights.model.eval()
        self.context = context_length(self.model.config)
        self._layout = CacheLayout.of(self.model.config)
        self._weights, self._tokenizer, self._prefill_tokens = weights, tokenizer, prefill_tokens
        self._device, self._interval = self.model.device, stream_interval
        self._additive = _wants_additive_mask(self.model)
        self._ends = end_tokens(self.model.generation_config, tokenizer)
        self._token_texts = TokenTexts(tokenizer)
        self._vocabulary: int = self.model.get_input_embeddings().weight.shape[0]
        self._grammars = Grammars(tokenizer, self._vocabulary, self._ends)
        self._scheduler = Scheduler(weights, self._layout, max_batch, switch_share, prefill_tokens)
        self._changes: deque[tuple[Mapping[str, PreferenceVector], Future[None]]] = deque()
        self._news = threading.Condition()
        """held wherever the scheduler is touched, notified of whatever ends a wait"""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._finished = self._failed = self._tokens = 0

    def check(self, request: Request) -> None:
        """See `Engine.check`."""
        self._checked(request)

    def submit(self, request: Request, emit: Emit) -> ScheduledRequest:
        """See `Engine.submit`. `emit` is called in the engine's thread."""
        matcher = self._checked(request)
        output = OutputState(request, self._tokenizer, self._ends, interval=self._interval)
        scheduled = ScheduledRequest(request, emit, output, random.Random(request.random_key()), matcher)
        request.timeline.submitted = time.time_ns()
        with self._news:
            if self._closed:
                raise EngineError("the engine is closed")
            self._scheduler.add(scheduled)
            self._news.notify()
        return scheduled

    def _checked(self, request: Request) -> LLMatcher | None:
        """Of the schema that the answer is to follow."""
        check_request(request, self._vocabulary, self.context)
        schema = request.sampling.json_schema
        return None if schema is None else self._grammars.matcher(schema)

    async def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """See `Engine.change`. Needs `start`."""
        changed: Future[None] = Future()
        with self._news:
            if self._closed:
                raise EngineError("the engine is closed")
            self._changes.append((vectors, changed))
            self._news.notify()
        await asyncio.wrap_future(changed)

    def status(self) -> EngineStatus:
        with self._news:
            return EngineStatus(
                running=self._scheduler.running,
                waiting=len(self._scheduler.waiting),
                finished=self._finished,
                cancelled=self._scheduler.cancelled,
                failed=self._failed,
                tokens=self._tokens,
                merges=self._weights.merges,
                cached_tokens=self._scheduler.cached_tokens,
            )

    # --- one step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what fits, then give every row of the batch whose turn it is one more token. False: nothing to do."""
        while self._changes:
            self._change(*self._changes.popleft())
        with self._news:
            batch = self._scheduler.next_batch()
            work = batch and self._scheduler.next_work(batch)
        if batch is None:
            return False
        try:
            if work == "prompts":
                self._prefill(batch)
            elif work == "chunk":
                self._prefill_chunk(batch)
            else:
                self._decode(batch)
        except InputError as error:  # coefficients that make a weight overflow
            self._fail(batch, error)
        except Exception as error:  # one batch's failure (out of memory, say) must not take the others with it
            log.exception("a batch of %d requests failed", batch.size)
            self._fail(batch, EngineError(f"the engine failed: {type(error).__name__}"))
        with self._news:
            self._scheduler.end_pass()
        return True

    @torch.inference_mode(False)  # what is built here lives on
    def _change(self, vectors: Mapping[str, PreferenceVector], changed: "Future[None]") -> None:
        if not changed.set_running_or_notify_cancel():
            return
        try:
            self._weights.change(vectors)
        except Exception as error:
            changed.set_exception(error)
        else:
            changed.set_result(None)

    def _prefill(self, batch: Batch) -> None:
        """Compute the prompts of the next joining requests, and their first token."""
        batch.rested = False
        with self._news:
            new = self._scheduler.next_prompts(batch)
        batch.rows += new
        lengths = [len(each.request.prompt) for each in new]
        ids_RT = torch.zeros(len(new), max(lengths), dtype=torch.long)
        for row, scheduled in enumerate(new):
            ids_RT[row, : lengths[row]] = torch.tensor(scheduled.request.prompt)
        positions_RT, masks = batch.cache.begin_prefill(lengths, self._device)
        ends = sorted({length - 1 for length in lengths})
        logits_REV = self._forward(new, ids_RT, positions_RT, masks, batch.cache, torch.tensor(ends))
        place_R = torch.tensor([ends.index(length - 1) for length in lengths], device=self._device)
        logits_RV = logits_REV[torch.arange(len(new), device=self._device), place_R]
        self._advance(batch, len(batch.rows) - len(new), logits_RV, ids_RT.numel())

    def _prefill_chunk(self, batch: Batch) -> None:
        """Compute the next part of a long prompt; at its end its row joins the others, with its first token."""
        batch.rested = False
        with self._news:
            scheduled, most = self._scheduler.next_long(batch), self._scheduler.prompt_tokens
        prompt = scheduled.request.prompt
        if batch.partial is None:  # an empty cache is false
            batch.partial = SlotCache(self._layout, rows=1)
        start = batch.partial.get_seq_length()
        # A chunk's mask has four times the numbers of that of a whole prompt of `prefill_tokens` at most, or one row's.
        width = min(len(prompt) - start, most, max(1, 4 * self._prefill_tokens**2 // len(prompt)))
        ids_1T = torch.tensor([prompt[start : start + width]])
        positions_1T, masks = batch.partial.begin_chunk(width, self._device)
        logits_1EV = self._forward([scheduled], ids_1T, positions_1T, masks, batch.partial, torch.tensor([width - 1]))
        if start + width == len(prompt):
            batch.cache.take(batch.partial)
            batch.partial = None
            batch.rows.append(batch.long.popleft())
            self._advance(batch, len(batch.rows) - 1, logits_1EV[:, 0], width)
        else:
            logits_1EV.sum().item()  # the pass is over when this is known
            with self._news:
                self._scheduler.charge([scheduled], width)

    def _decode(self, batch: Batch) -> None:
        batch.rested = True
        ids_R1 = torch.tensor([[each.output.generated[-1]] for each in batch.rows])
        positions_R1, masks = batch.cache.begin_decode(self._device)
        logits_R1V = self._forward(batch.rows, ids_R1, positions_R1, masks, batch.cache, torch.tensor([0]))
        self._advance(batch, 0, logits_R1V[:, 0])

    def _forward(
        self,
        rows: list[ScheduledRequest],
        ids: Tensor,
        positions: Tensor,
        masks: Masks,
        cache: SlotCache,
        keep: Tensor,
    ) -> Tensor:
        """Logits (rows, kept positions, vocabulary) in fp32."""
        self._weights.apply([each.request.coefficients for each in rows])
        if self._additive:
            least, dtype = torch.finfo(self.model.dtype).min, self.model.dtype
            masks = {kind: torch.zeros_like(m, dtype=dtype).masked_fill(~m, least) for kind, m in masks.items()}
        out = self.model(
            input_ids=ids.to(self._device),
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep.to(self._device),
        )
        return out.logits.float()

    def _advance(self, batch: Batch, first: int, logits_RV: Tensor, prompt_tokens: int = 0) -> None:
        """Give the rows from `first` on their next token; free what is done. `prompt_tokens`: see `charge`."""
        rows = batch.rows[first:]
        sound = torch.isfinite(logits_RV.amax(-1)).tolist()  # the largest is NaN where any is
        if not all(sound):
            logits_RV = torch.nan_to_num(logits_RV)
        params = [each.request.sampling for each in rows]
        prompts, answers = [each.request.prompt for each in rows], [each.output.generated for each in rows]
        possible_RV = masked(adjusted(logits_RV, params, prompts, answers), [each.matcher for each in rows])
        chosen = choose(possible_RV, params, [each.draws for each in rows])
        chosen = [each.output.resumed(token) for each, token in zip(rows, chosen, strict=True)]
        likely = self._likely(rows, logits_RV, chosen)
        deltas: list[OutputDelta | InputError | None] = []
        for each, token, best, finite in zip(rows, chosen, likely, sound, strict=True):
            if not finite:
                deltas.append(InputError(OVERFLOW))
            elif each.matcher and not each.matcher.consume_token(token):
                deltas.append(InputError(TOO_COMPLEX))
            else:
                deltas.append(each.output.push(token, best))
        with self._news:
            self._scheduler.charge(rows, prompt_tokens)
            self._tokens += sum(sound)
            for row in reversed(range(len(rows))):
                delta = deltas[row]
                if isinstance(delta, InputError):
                    self._failed += 1
                elif delta and delta.finish_reason:
                    self._finished += 1
                else:
                    continue
                self._scheduler.free(batch, first + row)
        now = time.time_ns()
        # Emitted last: when a caller has its answer, its row is free and its request is counted.
        for each, delta in zip(rows, deltas, strict=True):
            times = each.request.timeline
            times.first, times.last, times.tokens = times.first or now, now, len(each.output.generated)
            if delta:
                each.emit(delta)

    def _likely(
        self, rows: list[ScheduledRequest], logits_RV: Tensor, chosen: list[int]
    ) -> list[tuple[TokenLogprob, ...] | None]:
        """For each row that asks for log-probabilities: the chosen token, then the likeliest."""
        likely: list[tuple[TokenLogprob, ...] | None] = [None] * len(rows)
        tops = {row: top for row, each in enumerate(rows) if (top := each.request.sampling.logprobs) is not None}
        if tops:
            asked = list(tops)
            found = logprobs(logits_RV[asked], [chosen[row] for row in asked], list(tops.values()))
            for row, pairs in zip(asked, found, strict=True):
                likely[row] = tuple(TokenLogprob(*self._token_texts[token], value) for token, value in pairs)
        return likely

    def _fail(self, batch: Batch, error: Exception) -> None:
        self._weights.forget()
        with self._news:
            failed = self._scheduler.clear(batch)
            self._failed += len(failed)
        for scheduled in failed:
            scheduled.emit(error)

    # --- step after step, in a thread ---------------------------------------------------------------------------------

    def start(self) -> "SlotEngine":
        """Run in a thread until `close`. Returns self."""
        self._thread = threading.Thread(target=self._run, name="slot-engine", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    with self._news:
                        self._news.wait_for(lambda: self._closed or self._scheduler.waiting or self._changes)
        finally:  # also where the loop itself broke: no caller may wait for an answer that will not come
            self._end()

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
            left = self._scheduler.drain()
            changes, self._changes = self._changes, deque()
        for scheduled in left:
            scheduled.emit(EngineError("the engine was closed"))
        for _, changed in changes:
            if changed.set_running_or_notify_cancel():
                changed.set_exception(EngineError("the engine was closed"))


def _wants_additive_mask(model: PreTrainedModel) -> bool:
    """How the model's attention reads a 4-D mask: True for added numbers, False for booleans."""
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise InputError(
            f"attention implementation '{kind}': load the model with attn_implementation='sdpa' or 'eager'"
        )
    return bool(kind == "eager")

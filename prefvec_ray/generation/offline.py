"""Whole answers to many requests, for callers that wait for all of them: evaluation, search, notebooks."""

import asyncio
import atexit
import contextlib
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.generation.base import Coefficients, Engine, EngineError, OutputDelta, Request, Submitted
from prefvec_ray.generation.config import EngineOptions
from prefvec_ray.generation.load import load_engine
from prefvec_ray.generation.slots.engine import SlotEngine
from prefvec_ray.generation.slots.weights import WeightBackend
from prefvec_ray.vectors import PreferenceVector
from prefvec_ray.vectors.live import check_coefficients

T = TypeVar("T")

Use = Callable[[Mapping[str, float]], None]
"""Puts a whole model at a setting."""


class OfflineEngine:
    """An engine in threads of its own. `answer` may be called by several threads: their requests share its batches, or
    where the engine merges, settings are answered one after another, since turns would leave each with a smaller batch.

        engine = OfflineEngine.of(MergedWeights(live), tokenizer)
        engine.answer([Request(prompt, engine.coefficients({"helpful": 0.5}), SamplingParams(max_tokens=64))])

    `start` makes the engine, and is called in its event loop; `names` are those of its vectors.
    """

    def __init__(self, start: Callable[[], Awaitable[Engine]], names: Iterable[str]) -> None:
        self._names = dict.fromkeys(sorted(names))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="offline-engine", daemon=True).start()
        self._engine = self._wait(_called(start))
        self._turn = threading.Lock()
        self._closed = False
        atexit.register(self.close)  # a thread that still computes when Python ends would abort it

    @classmethod
    def of(cls, weights: WeightBackend, tokenizer: PreTrainedTokenizerBase, *, max_batch: int = 384) -> "OfflineEngine":
        """The slot engine on a model that is loaded already."""

        async def start() -> Engine:
            return SlotEngine(weights, tokenizer, max_batch=max_batch).start()

        return cls(start, weights.names)

    @classmethod
    def load(
        cls,
        base: Path,
        base_fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        vectors: Mapping[str, PreferenceVector],
        options: EngineOptions,
    ) -> "OfflineEngine":
        """The engine that `options` ask for. Errors as those of `load_engine`."""

        async def start() -> Engine:
            gpu = torch.cuda.is_available()
            return await load_engine(base, base_fingerprint, tokenizer, vectors, options, gpu=gpu, mapped=True)

        return cls(start, vectors)

    def coefficients(self, setting: Mapping[str, float]) -> Coefficients:
        """A setting as requests have it. InputError for an unknown name, or a number that is not finite."""
        return tuple(check_coefficients(setting, self._names).items())

    def answer(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """The tokens of every answer, end token included. Blocks until all are there.

        Raises:
            InputError: a request that cannot be answered: too long, or coefficients at which the model gives no finite
                logits.
            EngineError: the engine failed.
        """
        if self._engine.shares_batches:
            return self._gather(requests)
        found: list[tuple[int, ...]] = []
        for _, alike in itertools.groupby(requests, key=lambda request: request.coefficients):
            with self._turn:
                found += self._gather(list(alike))
        return found

    def with_model(self, work: Callable[[PreTrainedModel, Use], T]) -> T:
        """Call `work` while nothing is generated, with the model and what puts it at a setting.

        InputError where the engine has no model of transformers to give.
        """
        engine = self._engine
        if not isinstance(engine, SlotEngine):
            raise InputError("kl, perplexity and pairs need the model itself: use an engine of kind: transformers")

        def called(weights: WeightBackend) -> T:
            return work(weights.model, lambda setting: weights.apply([self.coefficients(setting)]))

        return engine.between_steps(called).result()

    def close(self) -> None:
        """End the engine, so that its model may leave memory. What still waits for answers gets EngineError. Python's
        own end does the same."""
        atexit.unregister(self.close)
        if self._closed:
            return
        self._closed = True

        async def closed() -> None:
            self._engine.close()
            await asyncio.sleep(0)  # what was cancelled says so

        self._wait(closed())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _gather(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        if self._closed:
            raise EngineError("the engine is closed")
        gathered = _Gathered(self._engine, requests)
        self._loop.call_soon_threadsafe(gathered.submit)
        try:
            return gathered.done.result()
        except BaseException:  # Ctrl-C too: what nobody waits for is not computed
            self._loop.call_soon_threadsafe(gathered.cancel)
            raise

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class _Gathered:
    """The answers to some requests, as they come. `submit` and `cancel` are called in the engine's event loop; what the
    engine emits comes from one thread, once an answer where only its tokens are wanted."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._found: list[tuple[int, ...]] = [()] * len(requests)
        self._submitted: list[Submitted] = []
        self._left = len(requests)
        self.done: Future[list[tuple[int, ...]]] = Future()

    def submit(self) -> None:
        try:
            for index, request in enumerate(self._requests):
                self._submitted.append(self._engine.submit(request, partial(self._take, index)))
        except Exception as error:
            self._fail(error)
        if not self._requests:
            self.done.set_result([])

    def cancel(self) -> None:
        for each in self._submitted:
            each.cancel()

    def _take(self, index: int, output: OutputDelta | Exception) -> None:
        if isinstance(output, Exception):
            self._fail(output)
            return
        self._found[index] += output.tokens
        self._left -= output.finish_reason is not None
        if not self._left:
            self.done.set_result(self._found)

    def _fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # another one has failed before
            self.done.set_exception(error)


async def _called(start: Callable[[], Awaitable[Engine]]) -> Engine:
    return await start()

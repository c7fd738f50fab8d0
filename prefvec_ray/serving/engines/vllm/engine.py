"""vLLM as the engine: its scheduler, paged KV cache and kernels, with coefficients per request.

Steered, all settings share one batch (`steering.py`), in compiled code and captured graphs too. Merged, requests of one
setting run together and the weights are rewritten between such turns. The prefix cache is on either way: blocks are
salted with the coefficients and the vectors' digests, so nothing computed under one setting is read under another.

vLLM runs in processes of its own; its client works in the replica's event loop.
"""

import asyncio
import contextlib
import hashlib
import itertools
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from prefvec_ray.common.chat import end_tokens
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import EngineConfig
from prefvec_ray.serving.engines.base import (
    Coefficients,
    Emit,
    EngineError,
    EngineStatus,
    OutputDelta,
    Request,
    TokenLogprob,
)
from prefvec_ray.serving.engines.grammar import Grammars
from prefvec_ray.serving.engines.output import OVERFLOW, OutputState, check_request
from prefvec_ray.serving.engines.sampling import LOWEST
from prefvec_ray.serving.engines.text import TokenTexts
from prefvec_ray.serving.engines.vllm.section import FIELD, SECTION, salt
from prefvec_ray.serving.engines.vllm.shape import SteeringShape
from prefvec_ray.vectors import Checkpoint, PreferenceVector, save_vector

WORKER = "prefvec_ray.serving.engines.vllm.worker.PreferenceWorker"


class VllmEngine:
    """See `Engine`. `await VllmEngine.start(...)` makes one; it belongs to the event loop that it is started in.

    Which device is vLLM's own choice: the GPUs that the process sees, else the CPU.
    """

    def __init__(
        self,
        llm: Any,
        base: str | Path,
        base_fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
    ):
        self._llm, self._base, self._fingerprint, self._tokenizer = llm, str(base), base_fingerprint, tokenizer
        self.context: int = llm.model_config.max_model_len
        self._vocabulary: int = llm.model_config.get_vocab_size()
        self._steered = config.mode == "steered"
        self._token_texts = TokenTexts(tokenizer)
        self._ends = end_tokens(_generation_config(base), tokenizer)
        self._grammars = Grammars(tokenizer, self._vocabulary, self._ends)
        self._numbers = itertools.count()
        self._turns = WeightTurns(self._merge, config.switch_share)
        self._scratch = tempfile.TemporaryDirectory(prefix="prefvec-vllm-")
        self._finished = self._cancelled = self._failed = self._tokens = 0
        self._tasks: set[asyncio.Task[OutputDelta]] = set()
        """one for every request"""
        self._generating: set[asyncio.Task[OutputDelta]] = set()
        """those that have got a token from vLLM"""
        self._known: frozenset[str] = frozenset()
        """names of the vectors that vLLM has"""
        self._closed = False

    @classmethod
    async def start(
        cls,
        base: str | Path,
        base_fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        vectors: Mapping[str, PreferenceVector],
        config: EngineConfig,
    ) -> "VllmEngine":
        """Start vLLM's processes and load the base and the vectors.

        Raises InputError for options in `config.vllm` that vLLM does not have or that are decided here, for vectors
        that cannot be steered, and where vLLM is not installed.
        """
        shape = SteeringShape.of(vectors.values(), config.columns) if config.mode == "steered" else None
        llm = await asyncio.to_thread(_start, base, config, shape)
        engine = cls(llm, base, base_fingerprint, tokenizer, config)
        try:
            await engine.change(vectors)
        except BaseException:
            engine.close()
            raise
        return engine

    def check(self, request: Request) -> None:
        """See `Engine.check`."""
        check_request(request, self._vocabulary, self.context)
        if request.sampling.json_schema is not None:
            self._grammars.matcher(request.sampling.json_schema)

    def submit(self, request: Request, emit: Emit) -> "asyncio.Task[OutputDelta]":
        """See `Engine.submit`. To be called in the engine's event loop, in which `emit` is called too."""
        self.check(request)
        if self._closed:
            raise EngineError("the engine is closed")
        task = asyncio.get_running_loop().create_task(self._answer(request, emit))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, emit))
        return task

    async def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """See `Engine.change`."""
        folders = {name: str(self._folder(vector)) for name, vector in vectors.items()}
        method = "prefvec_steer" if self._steered else "prefvec_hold"
        await self._ask(method, folders, self._fingerprint)
        self._known = frozenset(vectors)

    def status(self) -> EngineStatus:
        return EngineStatus(
            running=len(self._generating),
            waiting=len(self._tasks - self._generating),
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            tokens=self._tokens,
            merges=self._turns.switches,
        )

    def check_alive(self) -> None:
        """See `Engine.check_alive`."""
        if self._closed or self._llm.errored:
            raise EngineError("vLLM's engine is not running")

    def close(self) -> None:
        """See `Engine.close`. Running requests get their error once the event loop goes on."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._llm.shutdown()
        self._scratch.cleanup()

    async def _answer(self, request: Request, emit: Emit) -> OutputDelta:
        """Emits all deltas but the last, which it returns."""
        if unknown := [name for name, _ in request.coefficients if name not in self._known]:
            raise EngineError(f"no vector {unknown[0]!r} is known here")
        async with contextlib.nullcontext() if self._steered else self._turns.of(request.coefficients):
            return await self._generate(OutputState(request, self._tokenizer, self._ends), emit)

    def _ended(self, emit: Emit, task: "asyncio.Task[OutputDelta]") -> None:
        """Emits the end of the answer, once it is counted."""
        self._tasks.discard(task)
        self._generating.discard(task)
        if task.cancelled():
            self._cancelled += 1
            if self._closed:
                emit(EngineError("the engine was closed"))
        elif error := task.exception():
            self._failed += 1
            if not isinstance(error, InputError | EngineError):
                error = EngineError(f"vLLM failed: {type(error).__name__}")
            emit(error)
        else:
            self._finished += 1
            emit(task.result())

    async def _generate(self, answer: OutputState, emit: Emit) -> OutputDelta:
        from vllm.inputs.engine import tokens_input

        task, request = asyncio.current_task(), answer.request
        assert task is not None

        def push(token: int, likely: tuple[TokenLogprob, ...] | None = None) -> OutputDelta | None:
            """Emits what the token adds, or returns it where it ends the answer."""
            delta = answer.push(token, likely)
            if delta and not delta.finish_reason:
                emit(delta)
            return delta if delta and delta.finish_reason else None

        # Tokens that the caller has received already are part of vLLM's prompt, and emitted from there.
        resumed = request.resume_tokens
        if resumed and (request.sampling.presence_penalty or request.sampling.frequency_penalty):
            raise EngineError("vLLM cannot go on with an answer under presence or frequency penalties; ask again")
        scored = request.sampling.logprobs is not None and len(resumed) < request.max_tokens
        for token in () if scored else resumed:
            if last := push(token):
                return last
        # The names of coefficients say which vectors are meant.
        prompt = tokens_input([*request.prompt, *resumed], cache_salt=salt(request.coefficients))
        outputs = self._llm.generate(prompt, vllm_params(request, self._ends), str(next(self._numbers)))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if answer.produced < len(resumed):
                    at = output.prompt_logprobs[len(request.prompt) :]
                    for token, logprobs in zip(resumed, at, strict=True):
                        if last := push(token, self._likely(request, token, logprobs)):
                            return last
                new = output.outputs[0]
                for token, logprobs in zip(new.token_ids, new.logprobs or [], strict=True):
                    if math.isnan(logprobs[token].logprob):
                        raise InputError(OVERFLOW)
                    self._generating.add(task)
                    self._tokens += 1
                    if last := push(token, self._likely(request, token, logprobs)):
                        return last
        raise EngineError("vLLM ended an answer early")

    def _likely(self, request: Request, token: int, logprobs: Mapping[int, Any]) -> tuple[TokenLogprob, ...] | None:
        if request.sampling.logprobs is None:
            return None
        best = sorted(logprobs, key=lambda other: -logprobs[other].logprob)[: request.sampling.logprobs]
        return tuple(TokenLogprob(*self._token_texts[t], max(logprobs[t].logprob, LOWEST)) for t in (token, *best))

    def _folder(self, vector: PreferenceVector) -> Path:
        if vector.path is not None:
            return vector.path.absolute()
        folder = Path(self._scratch.name) / vector.digest().replace(":", "-")
        return folder if folder.exists() else save_vector(vector, folder)

    async def _merge(self, coefficients: Coefficients) -> None:
        await self._ask("prefvec_merge", self._base, dict(coefficients))

    async def _ask(self, method: str, *arguments: Any) -> None:
        """Call all workers. Raises InputError with what the first one returns as wrong."""
        for wrong in await self._llm.collective_rpc(method, args=arguments):
            if wrong:
                raise InputError(wrong)


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


def vllm_params(request: Request, ends: frozenset[int]) -> Any:
    """vLLM's `SamplingParams`. Text and stop strings are `OutputState`'s. The chosen token's log-probability is always
    asked for, because it is NaN where the model overflows."""
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    asked = request.sampling
    return vllm.SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=asked.biases or None,
        structured_outputs=asked.json_schema and StructuredOutputsParams(json=asked.json_schema),
        seed=int.from_bytes(hashlib.blake2b(request.random_key().encode(), digest_size=8).digest()) >> 1,
        max_tokens=request.max_tokens - len(request.resume_tokens),
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        logprobs=asked.logprobs or 0,
        prompt_logprobs=asked.logprobs if request.resume_tokens else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={FIELD: {name: eta for name, eta in request.coefficients if eta}},
    )


def _start(base: str | Path, config: EngineConfig, shape: SteeringShape | None) -> Any:
    """vLLM's `AsyncLLM`. It joins the event loop of the first call of one of its coroutines."""
    arguments = _arguments(base, config, shape)
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(arguments)


def _arguments(base: str | Path, config: EngineConfig, shape: SteeringShape | None) -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():  # else vLLM takes all of the machine's processors
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # the CPU build compiles anew where it should load that
    try:
        from vllm import AsyncEngineArgs
    except ImportError as error:
        raise InputError(f"engine.kind: vllm needs vLLM, which cannot be imported here ({error}); install it") from None
    ours: dict[str, Any] = {
        "model": str(base),
        "dtype": _stored_dtype(base) if config.dtype == "auto" else config.dtype,
        "max_num_seqs": config.max_batch,
        "worker_cls": WORKER,
        "disable_log_stats": True,
        "structured_outputs_config": {"backend": "guidance"},  # as the slot engine has it
    }
    if shape:
        ours["additional_config"] = {SECTION: {"shape": shape.model_dump(mode="json")}}
    known = {field.name for field in fields(AsyncEngineArgs)}
    wrong = sorted(name for name in config.vllm if name not in known or name in ours)
    if wrong:
        raise InputError(f"engine.vllm: {', '.join(wrong)}: no option of this vLLM, or decided by the other settings")
    return AsyncEngineArgs(**ours | config.vllm)


def _stored_dtype(base: str | Path) -> str:
    """vLLM's own "auto" would halve fp32 weights."""
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    return str(dtype or next(iter(Checkpoint(base).values())).dtype).removeprefix("torch.")


def _generation_config(base: str | Path) -> GenerationConfig:
    if (Path(base) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(base, local_files_only=True))

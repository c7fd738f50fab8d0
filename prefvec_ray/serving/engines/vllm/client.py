"""vLLM's client with preference vectors: what every request passes between vLLM's own server code and its engine.

Steered, all settings share one batch (`steering.py`), in compiled code and captured graphs too. Merged, requests of one
setting run together and the weights are rewritten between such turns. The prefix cache is on either way: blocks are
salted with the coefficients and the vectors' digests, so nothing computed under one setting is read under another.
"""

import asyncio
import contextlib
import math
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import EngineConfig
from prefvec_ray.serving.engines.base import Coefficients, EngineError, EngineStatus, PromptTooLongError
from prefvec_ray.serving.engines.output import OVERFLOW
from prefvec_ray.serving.engines.vllm.section import FIELD, salt
from prefvec_ray.serving.engines.vllm.turns import WeightTurns
from prefvec_ray.serving.spending import Spending
from prefvec_ray.vectors import PreferenceVector, save_vector

REQUEST = "request"
"""of a request's `vllm_xargs` on its way to the client: which `RequestRecord` it is of"""


@dataclass
class RequestRecord:
    """One request of a caller, with all of its prompts and answers."""

    coefficients: Coefficients
    spent: Spending
    """what was generated for it"""
    max_prompt_tokens: int | None = None
    ids: Callable[[str, list[int]], Awaitable[list[int]]] | None = None
    """the tokens of a prompt that vLLM has made of text: gets that text, and vLLM's tokens of it"""
    prompt_tokens: int = 0
    error: Exception | None = None
    """what went wrong here: vLLM's code tells its caller of it in words of its own"""


class PreferenceClient:
    """Wraps the `generate` of vLLM's `AsyncLLM` that it is given: from then on all that generates has coefficients, and
    is counted. `await change(...)` must give it vectors first."""

    def __init__(self, llm: Any, base: str | Path, base_fingerprint: str, config: EngineConfig):
        self._llm, self._base, self._fingerprint = llm, str(base), base_fingerprint
        self._steered = config.mode == "steered"
        self.turns = WeightTurns(self._merge, config.switch_share)
        self._scratch = tempfile.TemporaryDirectory(prefix="prefvec-vllm-")
        self._records: dict[str, RequestRecord] = {}
        self._known: frozenset[str] = frozenset()
        """names of the vectors that vLLM has"""
        self._begun = self._finished = self._cancelled = self._refused = self._failed = 0
        self._tokens = self._generating = 0
        self._generate = llm.generate
        llm.generate = self.generate

    async def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """See `Engine.change`."""
        folders = {name: str(self._folder(vector)) for name, vector in vectors.items()}
        method = "prefvec_steer" if self._steered else "prefvec_hold"
        await self._ask(method, folders, self._fingerprint)
        self._known = frozenset(vectors)

    @contextlib.contextmanager
    def recorded(self, name: str, record: RequestRecord) -> Iterator[RequestRecord]:
        """What generates under `{REQUEST: name}` in this block is of this record."""
        self._records[name] = record
        try:
            yield record
        finally:
            del self._records[name]

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
        """See vLLM's `AsyncLLM.generate`. Coefficients and limits are those of the record that `params.extra_args`
        names. Raises InputError where the model overflows at them, EngineError where they are of no known vector."""
        record = self._records[params.extra_args[REQUEST]]
        self._begun += 1
        count = _Count(self)
        try:
            prompt = await self._admitted(prompt, record)
            async with contextlib.nullcontext() if self._steered else self.turns.of(record.coefficients):
                outputs = self._generate(prompt, _with(params, record), request_id, **options)
                async with contextlib.aclosing(_checked(outputs, record, count)) as outputs:
                    async for output in outputs if _streams(params) else _whole(outputs):
                        yield output
            self._finished += 1
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled += 1
            raise
        except Exception as error:
            if _is_refusal(error):
                self._refused += 1
            else:
                self._failed += 1
            record.error = error
            raise
        finally:
            count.end()

    def status(self) -> EngineStatus:
        ended = self._finished + self._cancelled + self._refused + self._failed
        return EngineStatus(
            running=self._generating,
            waiting=self._begun - ended - self._generating,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            tokens=self._tokens,
            merges=self.turns.switches,
        )

    async def _admitted(self, prompt: Any, record: RequestRecord) -> Any:
        """The prompt with the salt of its coefficients, whoever else may have set one."""
        if unknown := [name for name, _ in record.coefficients if name not in self._known]:
            raise EngineError(f"no vector {unknown[0]!r} is known here")
        ids, allowed = prompt["prompt_token_ids"], record.max_prompt_tokens
        if record.ids and prompt.get("prompt"):
            ids = await record.ids(prompt["prompt"], ids)
        length = len(ids)
        if allowed is not None and length > allowed:
            raise PromptTooLongError(f"prompt of {length} tokens; at most {allowed} are allowed here; shorten it")
        record.prompt_tokens += length
        # The names of coefficients say which vectors are meant.
        return {**prompt, "prompt_token_ids": ids, "cache_salt": salt(record.coefficients)}

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


class _Count:
    """Of one prompt's answers, in the client's counters."""

    def __init__(self, client: PreferenceClient):
        self._client, self._begun = client, False

    def tokens(self, number: int) -> None:
        if not self._begun and number:
            self._begun = True
            self._client._generating += 1
        self._client._tokens += number

    def end(self) -> None:
        self._client._generating -= self._begun


async def _checked(outputs: AsyncGenerator[Any], record: RequestRecord, count: _Count) -> AsyncGenerator[Any]:
    """The outputs, counted. Raises InputError at the first token that the model could not compute."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            for new in output.outputs:
                count.tokens(len(new.token_ids))
                record.spent.tokens += len(new.token_ids)
                if any(math.isnan(each.logprob) for step in new.logprobs or [] for each in step.values()):
                    raise InputError(OVERFLOW)
            yield output


async def _whole(outputs: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """All outputs in one, as vLLM gives it where nobody streams."""
    whole = None
    async for output in outputs:
        if whole is None:
            whole = output
        else:
            whole.add(output, aggregate=True)
    if whole is not None:
        whole.outputs.sort(key=lambda answer: answer.index)
        yield whole


def _with(params: Any, record: RequestRecord) -> Any:
    """The parameters as the engine gets them. Outputs come token by token, so that they are counted also for a caller
    who hangs up, and with the chosen token's log-probability, because it is NaN where the model overflows."""
    from vllm.sampling_params import RequestOutputKind

    params = params.clone()
    params.extra_args = {FIELD: {name: eta for name, eta in record.coefficients if eta}}
    params.output_kind = RequestOutputKind.DELTA
    if params.logprobs is None:
        params.logprobs = 0
    return params


def _is_refusal(error: Exception) -> bool:
    """It is the caller's to correct: nothing failed here."""
    from vllm.exceptions import VLLMClientError

    return isinstance(error, PromptTooLongError | VLLMClientError)


def _streams(params: Any) -> bool:
    from vllm.sampling_params import RequestOutputKind

    return bool(params.output_kind == RequestOutputKind.DELTA)

"""A replica of `kind: vllm`: Ray Serve LLM's server with preference vectors. vLLM's own code answers OpenAI's API.

Ours is what Ray's server does not know: releases and their vectors, coefficients for each request, and what was spent.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase  # these two have no public name
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError

from prefvec_ray.common.chat import fold_system, special_tokens
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.errors import one_line
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.encoding import Tokenization, check_stops, check_whole, load_tokenizer
from prefvec_ray.serving.engines.base import EngineError, EngineStatus, PromptTooLongError
from prefvec_ray.serving.engines.sampling_params import SharedParams
from prefvec_ray.serving.engines.vllm.client import REQUEST, PreferenceClient, RequestRecord
from prefvec_ray.serving.engines.vllm.section import SECTION
from prefvec_ray.serving.engines.vllm.shape import SteeringShape
from prefvec_ray.serving.metrics import ReplicaMetrics
from prefvec_ray.serving.release.loaded import LoadedReleases
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.release.rollout import ReleaseBook
from prefvec_ray.serving.request import PassedRequest, ReleaseId, StreamPart, WholeAnswer
from prefvec_ray.serving.spending import SpentTokens
from prefvec_ray.serving.traces import Traces
from prefvec_ray.serving.turns import Turns
from prefvec_ray.vectors import PreferenceVector

LONGEST_MESSAGE = 500
TOO_LONG = "maximum context length"
"""vLLM says so of a prompt that does not fit"""


class BaseIsThere(CallbackBase):
    """Ray would start a process on each node to download the model first: it is a folder, which each replica checks."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class PreferenceServer(LLMServer):
    """Serve awaits the constructor, which returns only once a token has been generated.

    Raises JobError, before anything is loaded, where this node does not see the base or the registry's folder.
    """

    async def __init__(  # type: ignore[misc]  # Ray knows asynchronous constructors, mypy does not
        self, llm_config: LLMConfig, config: ServingConfig, release: Release, book: ReleaseBook
    ) -> None:
        self._config, self._spent = config, SpentTokens()
        self._metrics = ReplicaMetrics(config.model, serve.get_replica_context().replica_tag)
        self._releases = LoadedReleases(config.base, config.registry, release, book, self._change, self._generate_once)
        self._traces = Traces(config.traces, config.model, "replica")
        release = await asyncio.to_thread(self._begin)
        if config.engine.mode == "steered":
            shape = SteeringShape.of(self._releases.vectors.values(), config.engine.columns)
            llm_config.update_engine_kwargs(additional_config={SECTION: {"shape": shape.model_dump(mode="json")}})
        await super().__init__(llm_config)
        base = release.base_fingerprint
        self._client = PreferenceClient(self.engine._engine_client, config.base, base, config.engine)
        await self._change(self._releases.vectors)
        await self._generate_once(release)

    async def start(self) -> None:
        """Ray's own also tells Ray's makers what is served, through an actor that outlives the endpoint."""
        self.engine = self._engine_cls(self._llm_config)
        await self.engine.start()

    def _begin(self) -> Release:
        """The release that is served now, which it returns, and the tokenizer."""
        config = self._config
        release = self._releases.begin()
        tokenizer = load_tokenizer(config.base)
        self._encoder, self._turns = Tokenization(tokenizer, None, special_tokens(tokenizer)), Turns("prompts")
        return release

    async def stream_answer(self, asked: PassedRequest, marks: Mapping[str, Any]) -> AsyncGenerator[StreamPart]:
        """A stream's events as they come, each object with `marks` in it.

        Closing the iterator stops all of the request's generation. Raises InputError for what vLLM refuses, and
        EngineError where generation failed.
        """
        async with contextlib.aclosing(self._answer(asked)) as items:
            async for record, events in items:
                text = b"".join(_event(event, marks, record) for event in events)
                yield StreamPart(text, record.prompt_tokens, record.spent.tokens)

    async def whole_answer(self, asked: PassedRequest, marks: Mapping[str, Any]) -> WholeAnswer:
        """OpenAI's object as JSON, with `marks` in it. Raises as `stream_answer` does."""
        async with contextlib.aclosing(self._answer(asked)) as items:
            async for record, answer in items:
                body = {**_without_nothing(answer.model_dump(mode="json")), **marks}
                return WholeAnswer(json.dumps(body).encode(), record.prompt_tokens, record.spent.tokens)
        raise EngineError("vLLM gave no answer")

    async def spent(self, request_id: str) -> int | None:
        """Tokens that were generated here for the request of this id, once it has ended; None: it was not here."""
        return await self._spent.of(request_id)

    def status(self) -> EngineStatus:
        return self._client.status()

    async def check_health(self) -> None:
        """Serve calls this every few seconds, so metrics are reported here. It replaces a replica that raises."""
        self._metrics.report(self._client.status())
        await super().check_health()
        self._releases.check()

    async def prepare(self, release: Release, beside: ReleaseId) -> None:
        """See `LoadedReleases.prepare`."""
        await self._releases.prepare(release, beside)

    async def _change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        await self._client.change(vectors)

    async def _generate_once(self, release: Release) -> None:
        """One token, so that a replica which reports ready has answered."""
        coefficients = release.columns(release.policy.coefficients({}))
        asked = PassedRequest(False, {"prompt": [0], "max_tokens": 1}, coefficients, id="once")
        record = RequestRecord(coefficients, self._spent.begin(asked.id))
        with self._client.recorded(asked.id, record):
            async for _ in self._passed(asked, record):
                pass

    # --- one request --------------------------------------------------------------------------------------------------

    async def _answer(self, asked: PassedRequest) -> AsyncGenerator[tuple[RequestRecord, Any]]:
        """What vLLM gives: one object, or lists of a stream's events."""
        spent, trace = self._spent.begin(asked.id), self._traces.begin("answer", asked.trace)
        if asked.trace:
            asked = replace(asked, trace=trace.carrier)
        try:
            async with self._releases.running(asked.release) as release:
                coefficients = release.columns(asked.coefficients)
                record = RequestRecord(coefficients, spent, asked.max_prompt_tokens, partial(self._ids, asked))
                with self._client.recorded(asked.id, record):
                    async with contextlib.aclosing(self._passed(asked, record)) as answers:
                        async for answer in answers:
                            yield record, answer
        finally:
            spent.end()
            trace.end()

    async def _passed(self, asked: PassedRequest, record: RequestRecord) -> AsyncGenerator[Any]:
        try:
            request = self._request(asked)
            about = RawRequestInfo(headers=dict(asked.trace)) if asked.trace else None
            answers = await (self.chat if asked.chat else self.completions)(request, about)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    _raise_if_wrong(answer)
                    yield answer
        except Exception as error:
            raise _explained(record.error or error) from None

    def _request(self, asked: PassedRequest) -> Any:
        """vLLM's request. Raises InputError where the chat template or vLLM's protocol does not know it.

        And where it has a field of vLLM's own: the front lets nobody set one, and what came past it is refused here.
        """
        known = (chat_params if asked.chat else text_params).CompletionCreateParamsBase.__annotations__
        if foreign := [name for name in asked.body if name not in {*known, "stream", *SharedParams.model_fields}]:
            raise InputError(f"{one_line(foreign[0], 100)}: unknown field")
        stop = asked.body.get("stop", [])
        check_stops([stop] if isinstance(stop, str) else stop, self._encoder.special)
        body: dict[str, Any] = {**asked.body, "model": self._config.model, "request_id": asked.id}
        if asked.chat:
            if self._encoder.tokenizer.chat_template is None and "chat_template" not in self._config.engine.vllm:
                raise InputError("this model has no chat template; use /v1/completions")
            self._check_tools(body)
            messages = fold_system(body["messages"]) if self._config.system == "fold" else body["messages"]
            body["messages"] = self._hidden(messages)
        if body.get("temperature") == 0 and body.get("n", 1) > 1:
            body |= {"temperature": 1.0, "top_k": 1}  # the same choice, by which vLLM gives several answers
        request = (ChatCompletionRequest if asked.chat else CompletionRequest)(**body)
        request.vllm_xargs = {REQUEST: asked.id}
        return request

    def _check_tools(self, body: Mapping[str, Any]) -> None:
        """vLLM's own refusals speak of its command line."""
        if not body.get("tools") or body.get("tool_choice") == "none":
            return
        options, choice = self._config.engine.vllm, body.get("tool_choice", "auto")
        if "tool_call_parser" not in options:
            raise InputError("tools: this model's server reads no tool calls; ask its operator for a tool_call_parser")
        if choice == "auto" and not options.get("enable_auto_tool_choice"):
            raise InputError("tool_choice: 'auto' is not served for this model; name a function, or give 'required'")
        for token in self._encoder.special:
            if token in json.dumps(body["tools"], ensure_ascii=False):
                raise InputError(f"tools: {token!r} is a token of this model's turns; leave it out")

    def _hidden(self, told: Any) -> Any:
        """Messages in which names of special tokens are no tokens, so that none can end its turn and begin another."""
        if isinstance(told, str):
            return self._encoder.hidden(told)
        if isinstance(told, list):
            return [self._hidden(each) for each in told]
        return {name: self._hidden(each) for name, each in told.items()} if isinstance(told, dict) else told

    async def _ids(self, asked: PassedRequest, text: str, ids: list[int]) -> list[int]:
        """The tokens of a prompt that vLLM has made of text."""
        encoder = self._encoder
        if not asked.chat:
            ended = ids[-1:] == [encoder.tokenizer.eos_token_id] and not text.endswith(encoder.tokenizer.eos_token)
            return ids[:-1] if ended else ids  # it is to be continued
        check_whole([m for m in self._hidden(asked.body["messages"]) if m.get("content")], text)
        if not encoder.hides(text):
            return ids
        return await self._turns.run(asked.caller, encoder.revealed, text)


def _event(event: str, marks: Mapping[str, Any], record: RequestRecord) -> bytes:
    """One of vLLM's events, with marks. Raises what went wrong where it is an error."""
    told = event.removeprefix("data: ").strip()
    if told == "[DONE]":
        return event.encode()
    answer = json.loads(told)
    if "error" in answer:
        raise _explained(record.error or _refused(answer["error"]))
    return b"data: %s\n\n" % json.dumps({**answer, **marks}).encode()


def _without_nothing(answer: dict[str, Any]) -> dict[str, Any]:
    """The object without those of vLLM's own fields that say nothing; OpenAI's clients know the others."""
    return {name: value for name, value in answer.items() if value is not None}


def _raise_if_wrong(answer: Any) -> None:
    for each in answer if isinstance(answer, list) else [answer]:
        if isinstance(each, ErrorResponse):
            raise _refused(each.error.model_dump())


def _refused(error: Mapping[str, Any]) -> Exception:
    """vLLM's error object as an error of ours: what its caller can correct, and nothing of the server's inside."""
    message = one_line(error["message"].partition(" (parameter=")[0], LONGEST_MESSAGE)
    if error["code"] >= 500:
        return EngineError(f"vLLM failed: {message}")
    return PromptTooLongError(message) if TOO_LONG in message else InputError(message)


def _explained(error: Exception) -> Exception:
    match error:
        case InputError() | EngineError():
            return error
        case VLLMClientError():
            return InputError(one_line(error, LONGEST_MESSAGE))
        case ValidationError():
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            return InputError(one_line(f"{where}: {problem['msg']}", LONGEST_MESSAGE))
    return EngineError(f"vLLM failed: {type(error).__name__}: {error}")

"""OpenAI's protocol: models of its request bodies, and a builder of its responses, whose types come from `openai`.

Request bodies are models of our own, because the `openai` package has only type hints for them; their field
names are its names. A field of OpenAI's API that is not served here is refused, unless its value asks for
nothing, so that no caller believes in a setting that had no effect.
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefvec_ray.common.chat import SYSTEM_ROLES
from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.engines.base import Coefficients, FinishReason, OutputDelta, TokenLogprob
from prefvec_ray.serving.engines.sampling_params import SamplingParams, SharedParams
from prefvec_ray.serving.http.parsing import MOST_ITEMS
from prefvec_ray.serving.request import GenerationRequest, Prompt

Token = Annotated[int, Field(ge=0, lt=2**31)]
T = TypeVar("T")
L = TypeVar("L", chat_completion.ChoiceLogprobs, chat_completion_chunk.ChoiceLogprobs)
Some = Annotated[list[T], Field(min_length=1, fail_fast=True)]
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""fields for the provider's own book-keeping, which cannot change an answer here"""
NOTHING: dict[str, Any] = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "service_tier": "auto",
    "best_of": 1,
    "echo": False,
    "include_obfuscation": False,
    "tool_calls": [],
    "annotations": [],
    "suffix": "",
}
"""values of unserved fields that ask for nothing; null does too"""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _refuse_unserved(content: Any, known: set[str], fields: dict[str, Any]) -> Any:
    """Drop fields of OpenAI's API that ask for nothing; raise for those that would be without effect."""
    if not isinstance(content, dict):
        return content
    kept = {}
    for name, value in content.items():
        if value is None and (name in known or (name in fields and not fields[name].is_required())):
            continue  # as good as left out
        if name in fields or name not in known:
            kept[name] = value
        elif not (name in IGNORED or (name in NOTHING and value == NOTHING[name])):
            raise ValueError(f"'{name}' is not supported by this server; leave it out")
    return kept


class StreamOptions(_Strict):
    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        return _refuse_unserved(content, {"include_obfuscation"}, cls.model_fields)


class _Addressed(_Strict):
    """Who is asked for an answer."""

    model: str = Field(max_length=200)
    preferences: dict[str, float] | None = Field(default=None, max_length=100)
    """preference -> coefficient; those left out get the operator's default"""


class JsonSchema(_Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool | None = None
    """it is always followed"""


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' goes with type 'json_schema', and that type with it")
        return self

    @property
    def schema_text(self) -> str | None:
        """What an answer must be, for llguidance."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else {"type": "object"}
        # As json.dumps writes it. Free white space would let a weak model write nothing else.
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return json.dumps({**schema, "x-guidance": style}, sort_keys=True)


class _Body(SharedParams, _Addressed):
    """What chat and text completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    def prompts(self) -> tuple[Prompt, ...]:
        raise NotImplementedError

    @property
    def schema_text(self) -> str | None:
        return None

    def alternatives(self) -> int | None:
        """How many of each position's likeliest tokens to return; None: no log-probabilities at all."""
        raise NotImplementedError

    def job(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> GenerationRequest:
        """The work that this body asks for. Left-out settings have OpenAI's defaults (temperature and top_p 1)."""
        shared = {name: getattr(self, name) for name in SharedParams.model_fields}
        own = {"max_tokens": self.new_tokens, "logprobs": self.alternatives(), "json_schema": self.schema_text}
        sampling = SamplingParams(**shared | own)
        return GenerationRequest(self.prompts(), coefficients, sampling, max_prompt_tokens)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: str = Field(min_length=1, max_length=50)
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        """An answer of OpenAI's client, sent back as history, has fields that are null or empty."""
        known = set(ChatCompletionMessage.model_fields) | {"tool_call_id"}
        return _refuse_unserved(content, known, cls.model_fields)

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role in SYSTEM_ROLES else self.role, "content": text}


class ChatBody(_Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    """return the log-probability of every token of the answer"""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """and of this many of the likeliest tokens at its place"""
    response_format: ResponseFormat | None = None
    """JSON of a schema, or any JSON object"""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        known = set(chat_params.CompletionCreateParamsBase.__annotations__)
        return _refuse_unserved(content, known, cls.model_fields)

    @model_validator(mode="after")
    def _top_of_something(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_text(self) -> str | None:
        return self.response_format.schema_text if self.response_format else None

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self) -> tuple[Prompt, ...]:
        return (tuple(message.plain() for message in self.messages),)


class TextBody(_Body):
    """`POST /v1/completions`."""

    prompt: str | Some[str] | Some[Token] | Some[list[Token]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """return the log-probability of every token of the answer, and of this many of the likeliest at its place"""

    def alternatives(self) -> int | None:
        return self.logprobs

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        known = set(text_params.CompletionCreateParamsBase.__annotations__)
        return _refuse_unserved(content, known, cls.model_fields)

    def prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):  # then all are: lists of both kinds were refused
            return (tuple(self.prompt),)
        return tuple(p if isinstance(p, str) else tuple(p) for p in self.prompt if not isinstance(p, int))


Body: TypeAlias = ChatBody | TextBody


class ResponseBuilder:
    """Builds the objects of one answer: the same id, model, fingerprint and coefficients in all of them."""

    def __init__(self, body: Body, coefficients: Coefficients, fingerprint: str):
        self.chat = isinstance(body, ChatBody)
        self.include_usage = body.include_usage
        self.logprobs = body.alternatives() is not None
        self._common: dict[str, Any] = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
            # Beyond OpenAI's fields: `response.preferences` in its client.
            "preferences": dict(coefficients),
        }

    def headers(self) -> dict[str, str]:
        return {
            "x-prefvec-fingerprint": self._common["system_fingerprint"],
            "x-prefvec-preferences": json.dumps(self._common["preferences"]),
        }

    def whole(self, prompt_tokens: int, answers: list[OutputDelta]) -> ChatCompletion | Completion:
        """The answer to a request that does not stream."""
        usage = _usage(prompt_tokens, sum(len(answer.tokens) for answer in answers))
        if not self.chat:
            choices = [self._text_choice(i, a) for i, a in enumerate(answers)]
            return Completion(object="text_completion", choices=choices, usage=usage, **self._common)
        return ChatCompletion(
            object="chat.completion",
            choices=[
                chat_completion.Choice(
                    index=i,
                    finish_reason=answer.finish_reason or "stop",
                    logprobs=self._logprobs(answer, chat_completion.ChoiceLogprobs),
                    message=ChatCompletionMessage(role="assistant", content=answer.text),
                )
                for i, answer in enumerate(answers)
            ],
            usage=usage,
            **self._common,
        )

    def opening(self, answers: int) -> Iterator[bytes]:
        """The first events of a stream: a chat's choices begin with their role."""
        for index in range(answers if self.chat else 0):
            yield self._delta(index, None, role="assistant", content="")

    def piece(self, index: int, piece: OutputDelta) -> bytes:
        if not self.chat:
            # CompletionChoice wants a finish_reason; OpenAI's own streams send null until the last piece.
            choice = self._text_choice(index, piece)
            return _event(Completion(object="text_completion", choices=[choice], **self._common))
        logprobs = self._logprobs(piece, chat_completion_chunk.ChoiceLogprobs)
        return self._delta(index, piece.finish_reason, logprobs, content=piece.text)

    def closing(self, prompt_tokens: int, new_tokens: int) -> Iterator[bytes]:
        """The last events of a stream: the usage, if it was asked for, and the end."""
        usage = _usage(prompt_tokens, new_tokens)
        if self.include_usage and self.chat:
            yield _event(self._chunk(choices=[], usage=usage))
        elif self.include_usage:
            yield _event(Completion(object="text_completion", choices=[], usage=usage, **self._common))
        yield b"data: [DONE]\n\n"

    def _delta(
        self,
        index: int,
        reason: FinishReason | None,
        logprobs: chat_completion_chunk.ChoiceLogprobs | None = None,
        **delta: Any,
    ) -> bytes:
        choice = chat_completion_chunk.Choice(
            index=index, delta=chat_completion_chunk.ChoiceDelta(**delta), finish_reason=reason, logprobs=logprobs
        )
        return _event(self._chunk(choices=[choice]))

    def _logprobs(self, piece: OutputDelta, kind: type[L]) -> L | None:
        """A chat's log-probabilities, where they were asked for."""
        if not self.logprobs:
            return None
        content = [
            ChatCompletionTokenLogprob(
                **_told(said.chosen), top_logprobs=[TopLogprob(**_told(likely)) for likely in said.top]
            )
            for said in piece.logprobs
        ]
        return kind(content=content, refusal=None)

    def _text_choice(self, index: int, piece: OutputDelta) -> CompletionChoice:
        logprobs = None
        if self.logprobs:
            logprobs = Logprobs(
                text_offset=[said.offset for said in piece.logprobs],
                token_logprobs=[said.chosen.logprob for said in piece.logprobs],
                tokens=[said.chosen.text for said in piece.logprobs],
                top_logprobs=[{one.text: one.logprob for one in (*said.top, said.chosen)} for said in piece.logprobs],
            )
        fields = {"index": index, "text": piece.text, "finish_reason": piece.finish_reason, "logprobs": logprobs}
        return CompletionChoice.construct(**fields)  # type: ignore[arg-type]

    def _chunk(self, **fields: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(object="chat.completion.chunk", **fields, **self._common)


def error_event(error: ApiError) -> bytes:
    """An error after the stream has begun. OpenAI's clients raise APIError on it."""
    return b"data: %s\n\n" % json.dumps(error.body()).encode()


B = TypeVar("B", ChatBody, TextBody)


def _usage(prompt_tokens: int, new_tokens: int) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=new_tokens, total_tokens=prompt_tokens + new_tokens
    )


def _told(likely: TokenLogprob) -> dict[str, Any]:
    return {"token": likely.text, "bytes": list(likely.bytes), "logprob": likely.logprob}


def _event(content: BaseModel) -> bytes:
    return b"data: %s\n\n" % content.model_dump_json(exclude_unset=True, warnings=False).encode()

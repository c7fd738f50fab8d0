"""OpenAI's protocol: models of its request bodies, for the slot engine; `vllm_protocol.py` has vLLM's, and
`responses.py` the answers.

Request bodies are models of our own, because the `openai` package has only type hints for them; their field
names are its names. A field of OpenAI's API that is not served here is refused, unless its value asks for
nothing, so that no caller believes in a setting that had no effect.
"""

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefvec_ray.common.chat import SYSTEM_ROLES
from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.serving.engines.sampling_params import SamplingParams, SharedParams
from prefvec_ray.serving.http.parsing import MOST_ITEMS
from prefvec_ray.serving.request import GenerationRequest, ReplicaRequest

Token = Annotated[int, Field(ge=0, lt=2**31)]
T = TypeVar("T")
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
BYTES_PER_TOKEN = 4
"""of text, about"""


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def refuse_unserved(content: Any, known: set[str], fields: dict[str, Any]) -> Any:
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


class StreamOptions(Strict):
    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        return refuse_unserved(content, {"include_obfuscation"}, cls.model_fields)


class _Addressed(Strict):
    """Who is asked for an answer."""

    model: str = Field(max_length=200)
    preferences: dict[str, float] | None = Field(default=None, max_length=100)
    """preference -> coefficient; those left out get the operator's default"""


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool | None = None
    """it is always followed"""


class ResponseFormat(Strict):
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


class Body(SharedParams, _Addressed):
    """What chat and text completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def answers(self) -> int:
        """Prompts x n."""
        raise NotImplementedError

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, about: how many there really are only the replica knows."""
        raise NotImplementedError

    def replica_request(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> ReplicaRequest:
        """The work that this body asks for. Left-out settings have OpenAI's defaults (temperature and top_p 1)."""
        raise NotImplementedError

    def sampling(self, logprobs: int | None, json_schema: str | None = None) -> SamplingParams:
        """`logprobs`: how many of each position's likeliest tokens to return; None: no log-probabilities at all."""
        shared = {name: getattr(self, name) for name in SharedParams.model_fields}
        own = {"max_tokens": self.new_tokens, "logprobs": logprobs, "json_schema": json_schema}
        return SamplingParams(**shared | own)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: str = Field(min_length=1, max_length=50)
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        """An answer of OpenAI's client, sent back as history, has fields that are null or empty."""
        known = set(ChatCompletionMessage.model_fields) | {"tool_call_id"}
        return refuse_unserved(content, known, cls.model_fields)

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": plain_role(self.role), "content": text}


class ChatParams(Body):
    """Of chats, whichever engine answers."""

    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    """return the log-probability of every token of the answer"""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """and of this many of the likeliest tokens at its place"""
    response_format: ResponseFormat | None = None
    """JSON of a schema, or any JSON object"""

    @model_validator(mode="after")
    def _top_of_something(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class ChatBody(ChatParams):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        known = set(chat_params.CompletionCreateParamsBase.__annotations__)
        return refuse_unserved(content, known, cls.model_fields)

    @property
    def answers(self) -> int:
        return self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(about_tokens(message.plain()["content"]) for message in self.messages)

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self) -> tuple[tuple[dict[str, str], ...]]:
        return (tuple(message.plain() for message in self.messages),)

    def replica_request(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> GenerationRequest:
        schema = self.response_format.schema_text if self.response_format else None
        return GenerationRequest(
            self.prompts(), coefficients, self.sampling(self.alternatives(), schema), max_prompt_tokens
        )


class TextBody(Body):
    """`POST /v1/completions`."""

    prompt: str | Some[str] | Some[Token] | Some[list[Token]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """return the log-probability of every token of the answer, and of this many of the likeliest at its place"""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        known = set(text_params.CompletionCreateParamsBase.__annotations__)
        return refuse_unserved(content, known, cls.model_fields)

    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return len(self.prompts()) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(about_tokens(prompt) for prompt in self.prompts())

    def replica_request(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> ReplicaRequest:
        return GenerationRequest(self.prompts(), coefficients, self.sampling(self.logprobs), max_prompt_tokens)

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):  # then all are: lists of both kinds were refused
            return (tuple(self.prompt),)
        return tuple(p if isinstance(p, str) else tuple(p) for p in self.prompt if not isinstance(p, int))


def about_tokens(prompt: str | tuple[int, ...]) -> int:
    """The prompt's tokens, guessed by its bytes where it is text."""
    return len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


def plain_role(role: str) -> str:
    """Chat templates know one name for the operator's word."""
    return "system" if role in SYSTEM_ROLES else role

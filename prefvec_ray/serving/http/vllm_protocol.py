"""Request bodies of `kind: vllm`: what of OpenAI's API vLLM's own server code answers beyond the slot engine's.

They are checked here as the others are, by name and size, and then go on as they are. So nothing reaches vLLM that is
no part of OpenAI's API: coefficients or cache salts of a caller's own, chat templates, multimodal addresses.
"""

from typing import Annotated, Any, Literal, Self

from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from pydantic import Field, model_validator

from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.serving.http.openai_protocol import (
    ChatParams,
    Strict,
    TextBody,
    TextPart,
    about_tokens,
    plain_role,
    refuse_unserved,
)
from prefvec_ray.serving.http.parsing import MOST_ITEMS
from prefvec_ray.serving.request import PassedRequest

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
OURS = {"model", "preferences"}


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """a JSON schema, which the arguments of a named or required call follow"""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    name: FunctionName


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionChoice


class FunctionCall(Strict):
    name: FunctionName
    arguments: str


class ToolCall(Strict):
    id: str = Field(max_length=200)
    type: Literal["function"]
    function: FunctionCall


class ToolMessage(Strict):
    """A message of a chat, which may call tools or tell what one said."""

    role: str = Field(min_length=1, max_length=50)
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default=[], max_length=MOST_ITEMS, fail_fast=True)
    tool_call_id: str | None = Field(default=None, max_length=200)
    reasoning: str | None = None
    """an assistant's, as vLLM's answers have it"""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        """An answer of OpenAI's client, sent back as history, has fields that are null or empty."""
        return refuse_unserved(content, set(ChatCompletionMessage.model_fields), cls.model_fields)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has 'content', or an assistant's 'tool_calls'")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("'tool_calls' are an assistant's; leave them out")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("'tool_call_id' goes with role 'tool', and that role with it")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def passed(self) -> dict[str, Any]:
        """The message for vLLM."""
        told = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return told | {"role": plain_role(self.role), "content": self.text}


class VllmChatBody(ChatParams):
    """`POST /v1/chat/completions` where vLLM answers."""

    messages: list[ToolMessage] = Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)
    tools: list[Tool] = Field(default=[], max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, content: Any) -> Any:
        return refuse_unserved(content, set(chat_params.CompletionCreateParamsBase.__annotations__), cls.model_fields)

    @model_validator(mode="after")
    def _tools_to_choose(self) -> Self:
        if self.tool_choice in (None, "none"):
            return self
        names = [tool.function.name for tool in self.tools]
        if not names:
            raise ValueError("tool_choice: there are no 'tools' to choose from")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is none of the 'tools'")
        return self

    @property
    def answers(self) -> int:
        return self.n

    @property
    def prompt_tokens(self) -> int:
        told = [message.text for message in self.messages] + [tool.model_dump_json() for tool in self.tools]
        told += [message.reasoning for message in self.messages if message.reasoning]
        told += [call.function.arguments for message in self.messages for call in message.tool_calls]
        return sum(map(about_tokens, told))

    def replica_request(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> PassedRequest:
        body = _passed(self) | {"messages": [message.passed() for message in self.messages]}
        if self.response_format:
            body["response_format"] = self.response_format.model_dump(mode="json", by_alias=True, exclude_none=True)
        return PassedRequest(True, body, coefficients, max_prompt_tokens)


class VllmTextBody(TextBody):
    """`POST /v1/completions` where vLLM answers."""

    echo: bool | None = None
    """the answer begins with the prompt"""

    def replica_request(self, coefficients: Coefficients, max_prompt_tokens: int | None = None) -> PassedRequest:
        return PassedRequest(False, _passed(self), coefficients, max_prompt_tokens)


def _passed(body: VllmChatBody | VllmTextBody) -> dict[str, Any]:
    """What the caller has set, for vLLM."""
    return body.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude=OURS)

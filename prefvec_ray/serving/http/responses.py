"""The slot engine's answers in OpenAI's form, whose types come from `openai`, and what every answer has beside them."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.engines.base import Coefficients, FinishReason, OutputDelta, TokenLogprob
from prefvec_ray.serving.http.openai_protocol import ChatBody, TextBody

L = TypeVar("L", chat_completion.ChoiceLogprobs, chat_completion_chunk.ChoiceLogprobs)


def marks(model: str, coefficients: Coefficients, fingerprint: str) -> dict[str, Any]:
    """What every object of an answer has, whichever engine gives it."""
    # The coefficients are beyond OpenAI's fields: `response.preferences` in its client.
    return {"model": model, "system_fingerprint": fingerprint, "preferences": dict(coefficients)}


class ResponseBuilder:
    """Builds the objects of one answer, all with the same id and with what is `common` (see `marks`)."""

    def __init__(self, body: ChatBody | TextBody, common: Mapping[str, Any]):
        self.chat = isinstance(body, ChatBody)
        self.include_usage = body.include_usage
        self.logprobs = body.alternatives() is not None
        self._common: dict[str, Any] = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            **common,
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


def _usage(prompt_tokens: int, new_tokens: int) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=new_tokens, total_tokens=prompt_tokens + new_tokens
    )


def _told(likely: TokenLogprob) -> dict[str, Any]:
    return {"token": likely.text, "bytes": list(likely.bytes), "logprob": likely.logprob}


def _event(content: BaseModel) -> bytes:
    return b"data: %s\n\n" % content.model_dump_json(exclude_unset=True, warnings=False).encode()

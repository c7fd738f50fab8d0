"""One answer as it grows: tokens in, pieces of text out. Every engine tells its answers through this, so that stop
strings, half characters and log-probabilities come out the same whichever computed the tokens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import TypeAlias, TypeVar

from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import (
    FinishReason,
    OutputDelta,
    PromptTooLongError,
    Request,
    TokenLogprob,
    TokenLogprobs,
)
from prefvec_ray.serving.engines.text import TextStream

OVERFLOW = "the model computes NaN or infinity at these coefficients; choose smaller ones"


class OutputState:
    """`ends` are the tokens that end an answer."""

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]):
        self.request, self._ends = request, ends
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop_texts)
        self.last_token = -1
        self.produced = 0
        """tokens so far"""
        self._unsent: list[int] = []
        self._untold: list[TokenLogprobs] = []
        self._sent = 0
        """characters of the answer's text"""

    def push(self, token: int, likely: tuple[TokenLogprob, ...] | None = None) -> OutputDelta | None:
        """What the token adds to the answer, if there is anything to tell yet. `likely`: the token itself, then the
        likeliest at its place, where the request asks for them."""
        self.last_token = token
        self.produced += 1
        self._unsent.append(token)
        ended = token in self._ends
        known = self._text.decoded
        text = "" if ended else self._text.push(token)
        if likely:
            # What came out with it may begin with characters of tokens before it, whose other bytes never came.
            offset = max(known, self._text.decoded - len(likely[0].text))
            self._untold.append(TokenLogprobs(likely[0], likely[1:], offset))
        reason: FinishReason | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self.produced == self.request.max_tokens:
            reason = "length"
        if reason:
            text += self._text.finish()
        if not text and not reason:
            return None
        self._sent += len(text)
        # A token that begins in text held back may still turn out to belong to a stop string.
        told = tuple(t for t in self._untold if t.offset < self._sent)
        piece = OutputDelta(text, tuple(self._unsent), reason, told)
        self._unsent.clear()
        self._untold = self._untold[len(told) :]
        return piece


def end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's, which ends a turn of a chat."""
    named = config.eos_token_id if config else None
    both = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return frozenset(token for token in both if token is not None)


def check_request(request: Request, vocabulary: int, context: int) -> None:
    """See `Engine.check`."""
    if not request.prompt:
        raise InputError("the prompt has no tokens; give at least one")
    if len(request.prompt) + request.max_tokens > context:
        raise PromptTooLongError(
            f"prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones exceed the"
            f" model's context of {context}; shorten the prompt or ask for fewer tokens"
        )
    if not all(0 <= token < vocabulary for token in request.prompt):
        raise InputError(f"the prompt has token ids outside the model's vocabulary of {vocabulary}; correct them")


Emit: TypeAlias = Callable[[OutputDelta | Exception], None]
T = TypeVar("T")


async def stream_of(submit: Callable[[Emit], T], cancel: Callable[[T], object]) -> AsyncIterator[OutputDelta]:
    """The pieces that an engine's own thread emits, for the event loop that asks. `cancel` is called in the end."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[OutputDelta | Exception] = asyncio.Queue()

    def emit(piece: OutputDelta | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this any more
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    submitted = submit(emit)
    try:
        while True:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason:
                return
    finally:
        cancel(submitted)

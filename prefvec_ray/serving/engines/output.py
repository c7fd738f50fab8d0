"""One answer as it grows: tokens in, parts of its text out. Every engine reports its answers through this, so that stop
strings, half characters and log-probabilities come out the same whichever engine computed the tokens."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import (
    Engine,
    FinishReason,
    OutputDelta,
    PromptTooLongError,
    Request,
    Submitted,
    TokenLogprob,
    TokenLogprobs,
)
from prefvec_ray.serving.engines.text import TextStream

OVERFLOW = "the model computes NaN or infinity at these coefficients; choose smaller ones"


class OutputState:
    """`ends` are the tokens that end an answer; after its first delta, every other but the last has at least `interval`
    tokens."""

    def __init__(
        self, request: Request, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], *, interval: int = 1
    ):
        self.request, self._ends, self._interval = request, ends, interval
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop_texts)
        self.generated: list[int] = []
        """tokens so far"""
        self._unsent: list[int] = []
        self._unsent_text = ""
        self._unsent_logprobs: list[TokenLogprobs] = []
        self._sent = 0
        """characters of the answer's text"""

    @property
    def produced(self) -> int:
        return len(self.generated)

    def resumed(self, token: int) -> int:
        """The next token: the one that the caller has received already, where there is one, else `token`."""
        known = self.request.resume_tokens
        return known[self.produced] if self.produced < len(known) else token

    def push(self, token: int, likely: tuple[TokenLogprob, ...] | None = None) -> OutputDelta | None:
        """What the token adds to the answer, if there is anything to send yet. `likely`: the token itself, then the
        likeliest at its position, where the request asks for them."""
        self.generated.append(token)
        self._unsent.append(token)
        ended = token in self._ends
        known = self._text.decoded
        text = "" if ended else self._text.push(token)
        if likely:
            # What came out with it may begin with characters of tokens before it, whose other bytes never came.
            offset = max(known, self._text.decoded - len(likely[0].text))
            self._unsent_logprobs.append(TokenLogprobs(likely[0], likely[1:], offset))
        reason: FinishReason | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self.produced == self.request.max_tokens:
            reason = "length"
        if reason:
            text += self._text.finish()
        self._unsent_text += text
        early = self._sent > 0 and len(self._unsent) < self._interval
        if not reason and (early or not self._unsent_text):
            return None
        text, self._unsent_text = self._unsent_text, ""
        self._sent += len(text)
        # A token that begins in text held back may still turn out to belong to a stop string.
        logprobs = tuple(each for each in self._unsent_logprobs if each.offset < self._sent)
        delta = OutputDelta(text, tuple(self._unsent), reason, logprobs)
        self._unsent.clear()
        self._unsent_logprobs = self._unsent_logprobs[len(logprobs) :]
        return delta


def check_request(request: Request, vocabulary: int, context: int) -> None:
    """See `Engine.check`."""
    if not request.prompt:
        raise InputError("the prompt has no tokens; give at least one")
    if len(request.prompt) + request.max_tokens > context:
        raise PromptTooLongError(
            f"prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones exceed the"
            f" model's context of {context}; shorten the prompt or ask for fewer tokens"
        )
    if wrong := [token for token in request.sampling.biases if token >= vocabulary]:
        raise InputError(f"logit_bias: token {wrong[0]} is outside the model's vocabulary of {vocabulary}; correct it")
    if not all(0 <= token < vocabulary for token in request.prompt):
        raise InputError(f"the prompt has token ids outside the model's vocabulary of {vocabulary}; correct them")


async def stream_outputs(
    engine: Engine, requests: Sequence[Request], count: Callable[[OutputDelta], object] | None = None
) -> AsyncGenerator[list[tuple[int, OutputDelta]]]:
    """All answers side by side: lists of (place in `requests`, delta), until each answer has its finish_reason.

    One queue takes everything from the engine's thread to the event loop of the caller. `count` is called in the loop
    with every delta, also with those that are not read any more. Closing the iterator stops the generation.

    Raises InputError or EngineError, as soon as one request fails.
    """
    loop = asyncio.get_running_loop()
    outputs: asyncio.Queue[tuple[int, OutputDelta | Exception]] = asyncio.Queue()

    def receive(index: int, output: OutputDelta | Exception) -> None:
        if count and not isinstance(output, Exception):
            count(output)
        outputs.put_nowait((index, output))

    def emit(index: int, output: OutputDelta | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits for this any more
            loop.call_soon_threadsafe(receive, index, output)

    submitted: list[Submitted] = []
    try:
        for index, request in enumerate(requests):
            submitted.append(engine.submit(request, partial(emit, index)))
        left = len(requests)
        while left:
            received = [await outputs.get()]
            while not outputs.empty():
                received.append(outputs.get_nowait())
            deltas = [(index, _sound(output)) for index, output in received]
            left -= sum(delta.finish_reason is not None for _, delta in deltas)
            yield deltas
    finally:
        for each in submitted:
            each.cancel()


def _sound(output: OutputDelta | Exception) -> OutputDelta:
    if isinstance(output, Exception):
        raise output
    return output

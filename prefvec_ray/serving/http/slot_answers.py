"""Answers of the slot engine: its output is written in OpenAI's form here, and goes on where a replica dies."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, TypeAlias

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentResponseGenerator

from prefvec_ray.serving.access.errors import explained
from prefvec_ray.serving.http.answering import Answering, Exchange, stop
from prefvec_ray.serving.http.openai_protocol import ChatBody, TextBody
from prefvec_ray.serving.http.responses import ResponseBuilder, error_event
from prefvec_ray.serving.metrics import HUNG_UP
from prefvec_ray.serving.replay import Replay
from prefvec_ray.serving.request import Event, GenerationRequest, Started

MOST_DEATHS = 3
"""replicas that may die under one stream before it is broken off"""

Streams: TypeAlias = list[DeploymentResponseGenerator[Any]]


class SlotAnswering(Answering):
    """See `Answering`."""

    async def _whole(self, exchange: Exchange) -> bytes:
        entry = exchange.entry
        call = self._replicas.answer.remote(entry.request)
        async with self._ended_on_error(call, exchange):
            prompt_tokens, answers = await call
        self._note(entry)
        self._ended(exchange, 200, prompt_tokens, sum(len(answer.tokens) for answer in answers))
        return _writer(exchange).whole(prompt_tokens, answers).model_dump_json(exclude_unset=True).encode()

    async def _begin(self, exchange: Exchange) -> AsyncGenerator[bytes]:
        # With a seed of its own, so that another replica could say the same (see _deltas).
        request = exchange.entry.request
        assert isinstance(request, GenerationRequest)
        if request.sampling.seed is None:
            request = replace(request, sampling=request.sampling.model_copy(update={"seed": secrets.randbits(63)}))
        items = self._replicas.options(stream=True).stream.remote(request)
        async with self._ended_on_error(items, exchange):
            started = await anext(items)
        return self._events(exchange, request, [items], started.prompt_tokens)

    async def _deltas(self, request: GenerationRequest, calls: Streams, deadline: float) -> AsyncGenerator[list[Event]]:
        """The output of the request's replica; where that one dies, of another from there on. `calls`: the first one,
        and then those that were made."""
        replay, deaths = Replay(), 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(calls[-1], None)
            except RayActorError:
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise
                replay.again()
                request = replace(request, resume_tokens=replay.tokens(request.answers))
                calls.append(self._replicas.options(stream=True).stream.remote(request))
                continue
            if item is None:
                return
            if not isinstance(item, Started) and (new := replay.fresh(item)):
                yield new

    async def _events(
        self, exchange: Exchange, request: GenerationRequest, calls: Streams, prompt_tokens: int
    ) -> AsyncGenerator[bytes]:
        writer, new_tokens, status = _writer(exchange), 0, HUNG_UP
        deltas = self._deltas(request, calls, exchange.deadline)
        try:
            yield b"".join(writer.opening(request.answers))
            async for events in deltas:
                exchange.measure.piece()
                if not new_tokens:
                    self._note(exchange.entry)
                new_tokens += sum(len(piece.tokens) for _, piece in events)
                yield b"".join(writer.piece(index, piece) for index, piece in events)
            status = 200
            yield b"".join(writer.closing(prompt_tokens, new_tokens))
        except Exception as error:
            answer = explained(error)
            status = answer.status
            yield error_event(answer)
        finally:  # also where the caller has gone: nothing more is generated for it
            for call in calls:
                stop(call)
            self._ended(exchange, status, prompt_tokens, new_tokens)
            await deltas.aclose()


def _writer(exchange: Exchange) -> ResponseBuilder:
    body = exchange.entry.body
    assert isinstance(body, ChatBody | TextBody)
    return ResponseBuilder(body, exchange.marks)

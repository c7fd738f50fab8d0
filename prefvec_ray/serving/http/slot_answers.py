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
        call = self._replicas.answer.remote(entry.job)
        async with self._ended_on_error(call, exchange):
            prompt_tokens, answers = await call
        self._note(entry)
        self._ended(exchange, 200, prompt_tokens, sum(len(answer.tokens) for answer in answers))
        return _writer(exchange).whole(prompt_tokens, answers).model_dump_json(exclude_unset=True).encode()

    async def _begin(self, exchange: Exchange) -> AsyncGenerator[bytes]:
        # With a seed of its own, so that another replica could say the same (see _pieces).
        job = exchange.entry.job
        assert isinstance(job, GenerationRequest)
        if job.sampling.seed is None:
            job = replace(job, sampling=job.sampling.model_copy(update={"seed": secrets.randbits(63)}))
        items = self._replicas.options(stream=True).stream.remote(job)
        async with self._ended_on_error(items, exchange):
            started = await anext(items)
        return self._events(exchange, job, [items], started.prompt_tokens)

    async def _pieces(self, job: GenerationRequest, calls: Streams, deadline: float) -> AsyncGenerator[list[Event]]:
        """The output of the job's replica; where that one dies, of another from there on. `calls`: the first one,
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
                job = replace(job, resume_tokens=replay.tokens(job.answers))
                calls.append(self._replicas.options(stream=True).stream.remote(job))
                continue
            if item is None:
                return
            if not isinstance(item, Started) and (new := replay.fresh(item)):
                yield new

    async def _events(
        self, exchange: Exchange, job: GenerationRequest, calls: Streams, prompt_tokens: int
    ) -> AsyncGenerator[bytes]:
        writer, new_tokens, status = _writer(exchange), 0, HUNG_UP
        pieces = self._pieces(job, calls, exchange.deadline)
        try:
            yield b"".join(writer.opening(job.answers))
            async for events in pieces:
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
            await pieces.aclose()


def _writer(exchange: Exchange) -> ResponseBuilder:
    body = exchange.entry.body
    assert isinstance(body, ChatBody | TextBody)
    return ResponseBuilder(body, exchange.marks)

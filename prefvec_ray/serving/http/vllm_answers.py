"""Answers of vLLM: its own server code has written them, and they go on as they come."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.handle import DeploymentResponseGenerator

from prefvec_ray.serving.access.errors import explained
from prefvec_ray.serving.http.answering import Answering, Exchange, stop
from prefvec_ray.serving.http.responses import error_event
from prefvec_ray.serving.metrics import HUNG_UP
from prefvec_ray.serving.request import StreamPart


class VllmAnswering(Answering):
    """See `Answering`. A stream whose replica dies ends with an error."""

    async def _whole(self, exchange: Exchange) -> bytes:
        call = self._replicas.whole_answer.remote(exchange.entry.request, exchange.marks)
        async with self._ended_on_error(call, exchange):
            answer = await call
        self._note(exchange.entry)
        self._ended(exchange, 200, answer.prompt_tokens, answer.new_tokens)
        body: bytes = answer.body
        return body

    async def _begin(self, exchange: Exchange) -> AsyncGenerator[bytes]:
        parts = self._replicas.options(stream=True).stream_answer.remote(exchange.entry.request, exchange.marks)
        async with self._ended_on_error(parts, exchange):
            first = await anext(parts)
        return self._events(exchange, parts, first)

    async def _events(
        self, exchange: Exchange, parts: DeploymentResponseGenerator[Any], part: StreamPart | None
    ) -> AsyncGenerator[bytes]:
        last, status = StreamPart(b"", 0, 0), HUNG_UP
        self._note(exchange.entry)
        try:
            while part is not None:
                exchange.measure.piece()
                last = part
                yield part.events
                async with asyncio.timeout_at(exchange.deadline):
                    part = await anext(parts, None)
            status = 200
        except Exception as error:
            answer = explained(error)
            status = answer.status
            yield error_event(answer)
        finally:  # also where the caller has gone: nothing more is generated for it
            stop(parts)
            self._ended(exchange, status, last.prompt_tokens, last.new_tokens)

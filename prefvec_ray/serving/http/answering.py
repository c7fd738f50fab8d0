"""From an admitted request to its answer: the replicas are asked, their output is written in OpenAI's form, whole or as
a stream, and what it took is charged."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fastapi.responses import Response, StreamingResponse
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from prefvec_ray.serving.access.errors import ApiError, explained, one_line
from prefvec_ray.serving.http.admission import AdmittedRequest
from prefvec_ray.serving.http.openai_protocol import ResponseBuilder, error_event
from prefvec_ray.serving.metrics import HUNG_UP, RequestMetrics
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.replay import Replay
from prefvec_ray.serving.request import Event, GenerationRequest, Started

log = logging.getLogger("ray.serve")

SPENT_SECONDS = 5.0
"""for the replicas to report what a request that was broken off used"""
MOST_DEATHS = 3
"""replicas that may die under one stream before it is broken off"""
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Streams: TypeAlias = list[DeploymentResponseGenerator[Any]]


@dataclass(frozen=True)
class _Exchange:
    """An admitted request and what belongs to its answer."""

    entry: AdmittedRequest
    writer: ResponseBuilder
    measure: RequestMetrics
    deadline: float
    """by the event loop's clock"""

    @property
    def headers(self) -> dict[str, str]:
        return {**self.entry.headers, **self.writer.headers()}

    def failed(self, error: Exception) -> ApiError:
        """Ends a request that gets no answer. Its prompts were read, so what its sender could have known counts for
        them; what was worked on until the deadline counts in full; what the server could not do counts nothing."""
        answer = explained(error)
        self.measure.ended(answer.status, 0)
        self.entry.end(None if answer.status == 504 else self.entry.prompt_tokens if answer.status < 500 else 0)
        return answer


class Answering:
    """Has the replicas answer admitted requests."""

    def __init__(self, replicas: DeploymentHandle, records: ServingRecords):
        self._replicas, self._records = replicas, records
        self._charging: set[asyncio.Task[None]] = set()

    async def answer(self, entry: AdmittedRequest, measure: RequestMetrics, deadline: float) -> Response:
        """The HTTP answer. Raises ApiError. However it ends, also where its caller leaves, the request is ended and
        charged."""
        writer = ResponseBuilder(entry.body, entry.job.coefficients, entry.fingerprint)
        exchange = _Exchange(entry, writer, measure, deadline)
        return await (self._stream(exchange) if entry.body.stream else self._whole(exchange))

    async def _whole(self, exchange: _Exchange) -> Response:
        entry = exchange.entry
        call = self._replicas.answer.remote(entry.job)
        async with self._ended_on_error(call, exchange):
            prompt_tokens, answers = await call
        new_tokens = sum(len(answer.tokens) for answer in answers)
        entry.end(prompt_tokens + new_tokens)
        exchange.measure.ended(200, new_tokens)
        self._note(entry)
        whole = exchange.writer.whole(prompt_tokens, answers)
        return Response(whole.model_dump_json(exclude_unset=True), 200, exchange.headers, "application/json")

    async def _stream(self, exchange: _Exchange) -> Response:
        """Waits until the replica has accepted the job, so that what is wrong with it still gets its status code."""
        entry = exchange.entry
        # With a seed of its own, so that another replica could say the same (see _pieces).
        job = entry.job
        if job.sampling.seed is None:
            job = replace(job, sampling=job.sampling.model_copy(update={"seed": secrets.randbits(63)}))
        items = self._replicas.options(stream=True).stream.remote(job)
        async with self._ended_on_error(items, exchange):
            started = await anext(items)
        events = self._events(exchange, job, [items], started.prompt_tokens)
        # Begun here, so that it also ends, and its work with it, where the caller has gone before the first byte.
        parts = _begun(await anext(events), events)
        return StreamingResponse(parts, 200, exchange.headers | SSE_HEADERS, "text/event-stream")

    @contextlib.asynccontextmanager
    async def _ended_on_error(
        self, call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], exchange: _Exchange
    ) -> AsyncIterator[None]:
        """Ends call and request where this block raises, or takes until the deadline."""
        try:
            async with asyncio.timeout_at(exchange.deadline):
                yield
        except Exception as error:
            _stop(call)
            raise exchange.failed(error) from error
        except BaseException:  # a cancelled request: its caller has gone
            _stop(call)
            exchange.measure.ended(HUNG_UP, 0)
            self._charge_later(exchange.entry, exchange.entry.prompt_tokens)
            raise

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
        self, exchange: _Exchange, job: GenerationRequest, calls: Streams, prompt_tokens: int
    ) -> AsyncGenerator[bytes]:
        entry, writer = exchange.entry, exchange.writer
        new_tokens, status = 0, HUNG_UP
        pieces = self._pieces(job, calls, exchange.deadline)
        try:
            yield b"".join(writer.opening(job.answers))
            async for events in pieces:
                exchange.measure.piece()
                if not new_tokens:
                    self._note(entry)
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
                _stop(call)
            if status == 200:
                entry.end(prompt_tokens + new_tokens)
            else:
                self._charge_later(entry, prompt_tokens)
            exchange.measure.ended(status, new_tokens)
            await pieces.aclose()

    def _note(self, entry: AdmittedRequest) -> None:
        self._records.note(entry.fingerprint, entry.release, entry.job.coefficients, entry.caller.id)

    def _charge_later(self, entry: AdmittedRequest, prompt_tokens: int) -> None:
        """Count what was generated for a request that was broken off, also what its caller has not received. Only the
        replica knows that, once it has stopped."""
        if not entry.reservation.bins:  # its caller has no limit of tokens
            entry.end(None)
            return
        task = asyncio.get_running_loop().create_task(self._charge(entry, prompt_tokens))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)

    async def _charge(self, entry: AdmittedRequest, prompt_tokens: int) -> None:
        used = None
        try:
            asked = self._replicas.broadcast("spent", entry.job.id)
            said = [each for each in await asked.results_async(timeout_s=SPENT_SECONDS) if each is not None]
            used = prompt_tokens + sum(said) if said else None
        except Exception as error:
            log.warning("what a broken-off request used is not known, it counts in full: %s", one_line(error))
        finally:
            entry.end(used)


def _stop(call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """End a call's work on its replica. Where no replica took the call, `cancel` raises the reason once more."""
    with contextlib.suppress(RayServeException, RayError):
        call.cancel()


async def _begun(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """All of a stream whose first part was taken already."""
    try:
        yield first
        async for part in rest:
            yield part
    finally:
        await rest.aclose()

"""From an admitted request to its answer: the replicas are asked, what they say goes to the caller, whole or as a
stream, and what it took is charged. Common to both engines; `slot_answers.py` and `vllm_answers.py` have the rest."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from starlette.types import Receive, Scope, Send

from prefvec_ray.serving.access.errors import ApiError, explained, one_line
from prefvec_ray.serving.http.admission import AdmittedRequest
from prefvec_ray.serving.http.responses import marks
from prefvec_ray.serving.metrics import HUNG_UP, RequestMetrics
from prefvec_ray.serving.release.records import ServingRecords

log = logging.getLogger("ray.serve")

SPENT_SECONDS = 5.0
"""for the replicas to report what a request that was broken off used"""
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Exchange:
    """An admitted request and what belongs to its answer."""

    entry: AdmittedRequest
    measure: RequestMetrics
    deadline: float
    """by the event loop's clock"""

    @property
    def marks(self) -> dict[str, Any]:
        """What every object of the answer has."""
        return marks(self.entry.body.model, self.entry.request.coefficients, self.entry.fingerprint)

    @property
    def headers(self) -> dict[str, str]:
        return {
            **self.entry.headers,
            "x-prefvec-fingerprint": self.entry.fingerprint,
            "x-prefvec-preferences": json.dumps(dict(self.entry.request.coefficients)),
        }

    def failed(self, error: Exception) -> ApiError:
        """Ends a request that gets no answer. Its prompts were read, so what its sender could have known counts for
        them; what was worked on until the deadline counts in full; what the server could not do counts nothing."""
        answer, prompt_tokens = explained(error), self.entry.body.prompt_tokens
        self.measure.ended(answer.status, 0)
        self.entry.end(None if answer.status == 504 else prompt_tokens if answer.status < 500 else 0)
        return answer


class EventStream(StreamingResponse):
    """The first of server-sent events, then the rest. However the sending ends, `rest` is closed at once: Starlette
    leaves it to the garbage collector where a caller that hangs up interrupts a `send`."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], headers: Mapping[str, str]):
        self._rest = rest
        super().__init__(_begun(first, rest), 200, {**headers, **SSE_HEADERS}, "text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _begun(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


class Answering:
    """Has the replicas answer admitted requests."""

    def __init__(self, replicas: DeploymentHandle, records: ServingRecords):
        self._replicas, self._records = replicas, records
        self._charging: set[asyncio.Task[None]] = set()

    async def answer(self, entry: AdmittedRequest, measure: RequestMetrics, deadline: float) -> Response:
        """The HTTP answer. Raises ApiError. However it ends, also where its caller leaves, the request is ended and
        charged."""
        exchange = Exchange(entry, measure, deadline)
        if not entry.body.stream:
            return Response(await self._whole(exchange), 200, exchange.headers, "application/json")
        events = await self._begin(exchange)
        # Begun here, so that it also ends, and its work with it, where the caller has gone before the first byte.
        return EventStream(await anext(events), events, exchange.headers)

    async def _whole(self, exchange: Exchange) -> bytes:
        """The answer as JSON, counted and charged."""
        raise NotImplementedError

    async def _begin(self, exchange: Exchange) -> AsyncGenerator[bytes]:
        """The answer's events, once a replica has accepted the request, so that what is wrong with it still gets its
        status code. The first is there without a wait. They are counted and charged however they end."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def _ended_on_error(
        self, call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], exchange: Exchange
    ) -> AsyncIterator[None]:
        """Ends call and request where this block raises, or takes until the deadline."""
        try:
            async with asyncio.timeout_at(exchange.deadline):
                yield
        except Exception as error:
            stop(call)
            raise exchange.failed(error) from error
        except BaseException:  # a cancelled request: its caller has gone
            stop(call)
            exchange.measure.ended(HUNG_UP, 0)
            self._charge_later(exchange.entry, exchange.entry.body.prompt_tokens)
            raise

    def _ended(self, exchange: Exchange, status: int, prompt_tokens: int, new_tokens: int) -> None:
        """An answer that had begun is over."""
        if status == 200:
            exchange.entry.end(prompt_tokens + new_tokens)
        else:
            self._charge_later(exchange.entry, prompt_tokens)
        exchange.measure.ended(status, new_tokens, prompt_tokens)

    def _note(self, entry: AdmittedRequest) -> None:
        self._records.note(entry.fingerprint, entry.release, entry.request.coefficients, entry.caller.id)

    def _charge_later(self, entry: AdmittedRequest, prompt_tokens: int) -> None:
        """Count what was generated for a request that was broken off, also what its caller has not received. Only the
        replica knows that, once it has stopped."""
        if not entry.usage.counted:  # its caller has no limit of tokens
            entry.end(None)
            return
        task = asyncio.get_running_loop().create_task(self._charge(entry, prompt_tokens))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)

    async def _charge(self, entry: AdmittedRequest, prompt_tokens: int) -> None:
        used = None
        try:
            asked = self._replicas.broadcast("spent", entry.request.id)
            said = [each for each in await asked.results_async(timeout_s=SPENT_SECONDS) if each is not None]
            used = prompt_tokens + sum(said) if said else None
        except Exception as error:
            log.warning("what a broken-off request used is not known, it counts in full: %s", one_line(error))
        finally:
            entry.end(used)


def stop(call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """End a call's work on its replica. Where no replica took the call, `cancel` raises the reason once more."""
    with contextlib.suppress(RayServeException, RayError):
        call.cancel()

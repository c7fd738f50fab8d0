"""The Serve application: a thin OpenAI-compatible front, and replicas with the engine behind it.

    serve deploy serve_configs/tiny.yaml
    serve.run(build_app({"model": "tiny", "base": "runs/demo/base", "registry": "runs/demo/registry"}))

The front checks requests, decides the coefficients and writes OpenAI's objects; it holds no model.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from openai.types import Model
from pydantic.json_schema import models_json_schema
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig
from starlette.requests import Request as HttpRequest

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import open_registry
from prefvec_ray.serving.access.errors import ApiError, answer_in_openai_form, explained, one_line
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.http.admission import AdmissionController, AdmittedRequest
from prefvec_ray.serving.http.openai_protocol import (
    B,
    ChatBody,
    ModelList,
    PreferencesCard,
    PresetCard,
    ResponseBuilder,
    TextBody,
    VectorCard,
    error_event,
    model_card,
)
from prefvec_ray.serving.http.page import PAGE_HEADERS
from prefvec_ray.serving.http.page import router as page
from prefvec_ray.serving.http.reference import render
from prefvec_ray.serving.metrics import HUNG_UP, FrontMetrics, RequestMetrics
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import Release, resolve_release
from prefvec_ray.serving.release.rollout import ReleaseBook, RollOut
from prefvec_ray.serving.release.routing import SettingRouter
from prefvec_ray.serving.replay import Replay
from prefvec_ray.serving.request import Event, GenerationRequest, Started

log = logging.getLogger("ray.serve")

HEALTH_SECONDS = 5.0
MOST_DEATHS = 3
"""replicas that may die under one stream before it is broken off"""
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _Api(FastAPI):
    """Its description also has the request bodies, which the routes read themselves, to bound and check them first."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            template = "#/components/schemas/{model}"
            _, bodies = models_json_schema([(ChatBody, "validation"), (TextBody, "validation")], ref_template=template)
            super().openapi().setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        return super().openapi()


api = _Api(
    title="prefvec-ray",
    description="OpenAI-compatible answers, each at its caller's preferences",
    docs_url=None,  # FastAPI's own pages load scripts from another host; see reference.py
    redoc_url=None,
)
answer_in_openai_form(api)
api.include_router(page)


@api.get("/docs", include_in_schema=False)
async def reference() -> Response:
    """The API's own description, as a page without scripts."""
    return Response(render(api.openapi()), headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")


def _takes(model: type[ChatBody | TextBody]) -> dict[str, Any]:
    """The request body for the OpenAPI document."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# serve.ingress copies the class by value: what its methods use must be defined above it.


async def _next(items: DeploymentResponseGenerator[Any], deadline: float) -> Any:
    """The next item, None at the end; TimeoutError at the deadline, by the event loop's clock."""
    async with asyncio.timeout_at(deadline):
        return await anext(items, None)


def _route(request: HttpRequest) -> str:
    """The path without the prefix under which Serve runs the application."""
    return request.url.path.removeprefix(request.scope.get("root_path", ""))


def _stop(call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """End a call's work on its replica. Where no replica took the call, `cancel` raises the reason once more."""
    with contextlib.suppress(RayServeException, RayError):
        call.cancel()


def _unanswered(entry: AdmittedRequest, error: Exception, measure: RequestMetrics) -> ApiError:
    """Why there is no answer. What its sender could have known counts for the prompts, which were read all the same;
    what was worked on until the deadline counts in full; what the server could not do, for nothing."""
    told = explained(error)
    measure.ended(told.status, 0)
    entry.end(None if told.status == 504 else entry.prompt_tokens if told.status < 500 else 0)
    return told


async def _begun(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """All of a stream whose first part was taken already."""
    try:
        yield first
        async for part in rest:
            yield part
    finally:
        await rest.aclose()


@serve.ingress(api)
class Front:
    """Every route of the endpoint."""

    def __init__(self, config: ServingConfig, release: Release, replicas: DeploymentHandle):
        self._config, self._replicas = config, replicas
        registry = open_registry(config.registry)
        book = ReleaseBook(release.deployment)
        book.begin(release)
        self._admission = AdmissionController(config, book.newest() or release, registry)
        self._records = ServingRecords(registry, release.deployment)
        self._records.hold(self._release_of)
        self._metrics = FrontMetrics(config.model)
        self._charging: set[asyncio.Task[None]] = set()
        self._metrics.serves(self._release_of.generation)
        self._rollout = RollOut(config, registry, book, self._admission, self._records, replicas)
        if config.follow_seconds:
            self._following = asyncio.get_running_loop().create_task(self._rollout.follow(config.follow_seconds))

    def __del__(self) -> None:
        self._records.close()

    @property
    def _release_of(self) -> Release:
        return self._admission.release

    async def roll_out(self, wanted: ServingConfig) -> Release:
        """Not a route: what `serving.roll_out` calls. See `RollOut.to`."""
        return await self._rollout.to(wanted)

    def reconfigure(self, about: dict[str, Any]) -> None:
        """Serve wants this of a deployment with a `user_config`, which here says what runs and changes nothing."""

    def check_health(self) -> None:
        """Serve asks this every few seconds."""
        self._metrics.serves(self._release_of.generation)

    @api.post("/v1/chat/completions", openapi_extra=_takes(ChatBody))
    async def chat(self, request: HttpRequest) -> Response:
        return await self._complete(request, ChatBody)

    @api.post("/v1/completions", openapi_extra=_takes(TextBody))
    async def complete(self, request: HttpRequest) -> Response:
        return await self._complete(request, TextBody)

    @api.get("/v1/models")
    async def models(self, request: HttpRequest) -> ModelList:
        caller = await self._admission.identify("/v1/models", request.headers)
        presets = await asyncio.to_thread(self._admission.presets, caller)
        names = [self._config.model, *(f"{self._config.model}@{name}" for name in presets)]
        return ModelList(data=[model_card(name, caller.release.created) for name in names])

    @api.get("/v1/models/{name}")
    async def model(self, name: str, request: HttpRequest) -> Model:
        caller = await self._admission.identify("/v1/models/{name}", request.headers, model=name)
        return model_card(name, caller.release.created)

    @api.get("/v1/preferences")
    async def preferences(self, request: HttpRequest) -> PreferencesCard:
        caller = await self._admission.identify("/v1/preferences", request.headers)
        presets = await asyncio.to_thread(self._admission.presets, caller)
        # One release for all of it: a roll-out may bring the next one while the presets are read.
        ranges, release = caller.policy.ranges, caller.release
        return PreferencesCard(
            model=self._config.model,
            base_fingerprint=release.base_fingerprint,
            coefficients=caller.allowance.coefficients,
            preferences=[
                VectorCard(
                    preference=name,
                    vector=vector.ref,
                    digest=vector.digest,
                    metrics=dict(vector.metrics),
                    **ranges[name].model_dump(),
                )
                for name, vector in release.vectors.items()
            ],
            presets=[
                PresetCard(
                    model=f"{self._config.model}@{name}",
                    version=preset.version,
                    preferences=dict(coefficients),
                    fingerprint=release.fingerprint(coefficients),
                    metrics=preset.metrics,
                    reason=preset.reason,
                )
                for name, (preset, coefficients) in presets.items()
            ],
        )

    @api.get("/healthz")
    async def health(self) -> dict[str, Any]:
        """200 while every replica answers, with their engines' counters; asked past the queue, so also under load."""
        try:
            replicas = await self._replicas.broadcast("status").results_async(timeout_s=HEALTH_SECONDS)
        except DeploymentUnavailableError:
            replicas = []
        except Exception as error:
            raise ApiError(503, "a replica does not answer", code="unavailable") from error
        if not replicas and self._config.replicas.min:
            raise ApiError(503, "no replica is running", code="unavailable")
        return {"status": "ok" if replicas else "idle", "replicas": replicas}

    async def _complete(self, request: HttpRequest, kind: type[B]) -> Response:
        async def read() -> bytes:
            return await self._body(request)

        began = asyncio.get_running_loop().time()
        try:
            entry = await self._admission.admit(_route(request), request.headers, read, kind)
        except ApiError as error:
            self._metrics.refused(error.status)
            raise
        measure = self._metrics.admitted(entry.body.model, free=bool(entry.body.preferences))
        deadline = began + entry.seconds
        coefficients = entry.job.coefficients
        fingerprint = entry.release.fingerprint(coefficients)
        writer = ResponseBuilder(entry.body, coefficients, fingerprint)
        if entry.body.stream:
            return await self._stream(entry, writer, deadline, measure)
        response = self._replicas.answer.remote(entry.job)
        try:
            async with asyncio.timeout_at(deadline):
                prompt_tokens, answers = await response
        except BaseException as error:  # also a cancelled request: its caller has gone
            _stop(response)
            if isinstance(error, Exception):
                raise _unanswered(entry, error, measure) from error
            measure.ended(HUNG_UP, 0)
            self._charge_later(entry, entry.prompt_tokens)
            raise
        new_tokens = sum(len(answer.tokens) for answer in answers)
        entry.end(prompt_tokens + new_tokens)
        measure.ended(200, new_tokens)
        self._note(entry)
        whole = writer.whole(prompt_tokens, answers)
        headers = {**entry.headers, **writer.headers()}
        return Response(whole.model_dump_json(exclude_unset=True), 200, headers, "application/json")

    def _note(self, entry: AdmittedRequest) -> None:
        coefficients = entry.job.coefficients
        self._records.note(entry.release.fingerprint(coefficients), entry.release, coefficients, entry.caller.id)

    async def _stream(
        self, entry: AdmittedRequest, writer: ResponseBuilder, deadline: float, measure: RequestMetrics
    ) -> Response:
        """Waits until the replica has accepted the job, so that what is wrong with it still gets its status code."""
        # With a seed of its own, so that another replica could say the same (see _pieces).
        job = entry.job
        if job.sampling.seed is None:
            job = replace(job, sampling=job.sampling.model_copy(update={"seed": secrets.randbits(63)}))
        items = self._replicas.options(stream=True).stream.remote(job)
        try:
            started = await _next(items, deadline)
        except BaseException as error:
            _stop(items)
            if isinstance(error, Exception):
                raise _unanswered(entry, error, measure) from error
            measure.ended(HUNG_UP, 0)
            self._charge_later(entry, entry.prompt_tokens)
            raise
        calls = [items]
        pieces = self._pieces(job, calls, deadline)
        events = self._events(pieces, calls, entry, writer, started.prompt_tokens, measure)
        # Begun here, so that it also ends, and its work with it, where the caller has gone before the first byte.
        parts = _begun(await anext(events), events)
        headers = {**entry.headers, **writer.headers(), **SSE_HEADERS}
        return StreamingResponse(parts, 200, headers, "text/event-stream")

    async def _pieces(
        self, job: GenerationRequest, calls: list[DeploymentResponseGenerator[Any]], deadline: float
    ) -> AsyncGenerator[list[Event]]:
        """What the job's replica says; where that one dies, what another says from there on. `calls`: the first one,
        and then those that were made."""
        replay, deaths = Replay(), 0
        while True:
            try:
                item = await _next(calls[-1], deadline)
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
        self,
        pieces: AsyncGenerator[list[Event]],
        calls: list[DeploymentResponseGenerator[Any]],
        entry: AdmittedRequest,
        writer: ResponseBuilder,
        prompt_tokens: int,
        measure: RequestMetrics,
    ) -> AsyncGenerator[bytes]:
        new_tokens, status = 0, HUNG_UP
        try:
            yield b"".join(writer.opening(entry.job.answers))
            async for events in pieces:
                measure.piece()
                if not new_tokens:
                    self._note(entry)
                new_tokens += sum(len(piece.tokens) for _, piece in events)
                yield b"".join(writer.piece(index, piece) for index, piece in events)
            status = 200
            yield b"".join(writer.closing(prompt_tokens, new_tokens))
        except Exception as error:
            told = explained(error)
            status = told.status
            yield error_event(told)
        finally:  # also where the caller has gone: nothing more is generated for it
            for call in calls:
                _stop(call)
            if status == 200:
                entry.end(prompt_tokens + new_tokens)
            else:
                self._charge_later(entry, prompt_tokens)
            measure.ended(status, new_tokens)
            await pieces.aclose()

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
            said = [each for each in await asked.results_async(timeout_s=HEALTH_SECONDS) if each is not None]
            used = prompt_tokens + sum(said) if said else None
        except Exception as error:
            log.warning("what a broken-off request used is not known, it counts in full: %s", one_line(error))
        finally:
            entry.end(used)

    async def _body(self, request: HttpRequest) -> bytes:
        """The request's JSON text. Raises ApiError where it is too large or of another type."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "expected a body of content type application/json")
        content, limits = bytearray(), self._config.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limits.body_bytes:
                        most = limits.body_bytes
                        raise ApiError(413, f"the body is larger than {most} bytes; shorten it", code="too_large")
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s", code="timeout") from None
        return bytes(content)


def build_app(args: Mapping[str, Any] | ServingConfig) -> serve.Application:
    """The application for `ServingConfig` settings, given as a mapping (from a Serve config's `args`) or ready.

    Base and vectors are checked, and fixed to their versions, here. Raises InputError with one clear line where
    something is wrong with them.
    """
    if not isinstance(args, ServingConfig):
        args = parse_config(dict(args), ServingConfig, source="args")
    return application(args, uuid.uuid4().hex[:12])


def application(config: ServingConfig, deployment: str) -> serve.Application:
    """`build_app` under a given identity. Identity and config can be read from the running application
    (`instance.py`), by whoever wants to deploy under the same name."""
    from prefvec_ray.serving.replica import Replica  # brings torch, which the front does without

    config = config.absolute()
    if config.engine.kind == "vllm" and find_spec("vllm") is None:
        raise InputError("engine.kind: vllm, but vLLM is not installed here; see docs/serving.md, or leave 'kind' out")
    release = replace(resolve_release(config), deployment=deployment)
    AdmissionController(
        config, release, open_registry(config.registry)
    )  # keys and audit are looked at here, not once it is deployed
    replica = serve.deployment(Replica, name=_replica_name(config, release)).options(**_scale(config))
    replicas = replica.bind(config, release, ReleaseBook(release.deployment))
    front = serve.deployment(Front, name="front").options(
        user_config={"deployment": deployment, "config": config.model_dump(mode="json")},
        logging_config=_logs(config),
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=config.limits.seconds,  # as its replicas: it holds the answers' connections
        ray_actor_options={"num_cpus": 0},  # with one replica an endpoint fits on one CPU
    )
    return front.bind(config, release, replicas)


def _replica_name(config: ServingConfig, release: Release) -> str:
    """While Serve puts new replicas in the place of old ones, the new front may ask the old replicas, and the old front
    the new. They learn each other's vectors; another base, or another engine, must be another deployment to Serve."""
    engine = hashlib.blake2b(
        config.engine.model_dump_json().encode() + release.base_fingerprint.encode(), digest_size=4
    )
    return f"replica-{engine.hexdigest()}"


def _logs(config: ServingConfig) -> LoggingConfig:
    return LoggingConfig(log_level=config.logs.level, enable_access_log=config.logs.access)


def _scale(config: ServingConfig) -> dict[str, Any]:
    """Serve's options for the replicas. One replica takes twice its batch, so that its queue is never empty."""
    wanted = config.replicas
    options: dict[str, Any] = {
        "logging_config": _logs(config),
        "max_ongoing_requests": 2 * config.engine.max_batch,
        "max_queued_requests": config.limits.queued_requests,
        # A replica that must go finishes the answers it has begun.
        "graceful_shutdown_timeout_s": config.limits.seconds,
        "ray_actor_options": {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus},
    }
    if config.engine.mode == "merged":
        options["request_router_config"] = RequestRouterConfig(request_router_class=SettingRouter)
    if wanted.min == wanted.max:
        return options | {"num_replicas": wanted.max}
    scaling = {
        "min_replicas": wanted.min,
        "max_replicas": wanted.max,
        "target_ongoing_requests": wanted.target_requests,
        "look_back_period_s": wanted.window_seconds,
        "metrics_interval_s": wanted.window_seconds / 3,  # Serve's own proportion
        "upscale_delay_s": wanted.grow_seconds,
        "downscale_delay_s": wanted.shrink_seconds,
        "downscale_to_zero_delay_s": wanted.idle_seconds,
    }
    return options | {"autoscaling_config": scaling}

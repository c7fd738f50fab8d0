"""The Serve application: a thin OpenAI-compatible front, and replicas with the engine behind it.

    serve deploy serve_configs/tiny.yaml
    serve.run(build_app({"model": "tiny", "base": "runs/demo/base", "registry": "runs/demo/registry"}))

The front checks requests, decides the coefficients and writes OpenAI's objects; it holds no model.
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import Response
from openai.types import Model
from pydantic.json_schema import models_json_schema
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request as HttpRequest

from prefvec_ray.common.cluster import SERVE_GRPC, raise_cause
from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import open_registry
from prefvec_ray.serving.access.errors import ApiError, answer_in_openai_form
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.http.admission import AdmissionController
from prefvec_ray.serving.http.cards import Health, ModelList, PreferencesCard, model_card, preferences_card
from prefvec_ray.serving.http.coordinator import Coordinator, shared_usages
from prefvec_ray.serving.http.openai_protocol import Body, ChatBody, TextBody
from prefvec_ray.serving.http.page import PAGE_HEADERS
from prefvec_ray.serving.http.page import router as page
from prefvec_ray.serving.http.reference import render
from prefvec_ray.serving.http.slot_answers import SlotAnswering
from prefvec_ray.serving.http.vllm_answers import VllmAnswering
from prefvec_ray.serving.http.vllm_protocol import VllmChatBody, VllmTextBody
from prefvec_ray.serving.metrics import HUNG_UP, FrontMetrics
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import Release, resolve_release
from prefvec_ray.serving.release.rollout import ReleaseBook, RollOut
from prefvec_ray.serving.release.routing import PrefixRouter, SettingRouter
from prefvec_ray.serving.traces import Traces, check_traces

HEALTH_SECONDS = 5.0
MOST_ASKED = 100_000
"""questions of the fronts under way at the coordinator; each is answered at once"""
Bodies = dict[str, type[Body]]
"""of one route, by the engine's kind"""
CHATS: Bodies = {"transformers": ChatBody, "vllm": VllmChatBody}
TEXTS: Bodies = {"transformers": TextBody, "vllm": VllmTextBody}
UNSERVED = {
    "/v1/embeddings": "this endpoint has a model that writes, not one for embeddings",
    "/v1/responses": "use /v1/chat/completions, which every client of OpenAI has too",
}
"""routes of OpenAI's API that clients may try, and why they are refused"""


class _Api(FastAPI):
    """Its description also has the request bodies, which the routes read themselves, to bound and check them first."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            template = "#/components/schemas/{model}"
            models: list[tuple[type[Body], Literal["validation"]]] = [
                (model, "validation") for model in (*CHATS.values(), *TEXTS.values())
            ]
            _, bodies = models_json_schema(models, ref_template=template)
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


def _takes(bodies: Bodies) -> dict[str, Any]:
    """The request bodies for the OpenAPI document."""
    schema = {"anyOf": [{"$ref": f"#/components/schemas/{model.__name__}"} for model in bodies.values()]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# serve.ingress copies the class by value: what its methods use must be defined above it.


def _route(request: HttpRequest) -> str:
    """The path without the prefix under which Serve runs the application."""
    return request.url.path.removeprefix(request.scope.get("root_path", ""))


@serve.ingress(api)
class Front:
    """Every route of the endpoint."""

    def __init__(
        self,
        config: ServingConfig,
        release: Release,
        replicas: DeploymentHandle,
        coordinator: DeploymentHandle | None = None,
    ):
        # Straight to the other process, but on a cluster that was told not to (common/cluster.py).
        by_reference = os.environ.get(SERVE_GRPC) == "0"
        replicas = replicas.options(_by_reference=by_reference)
        coordinator = coordinator.options(_by_reference=by_reference) if coordinator else None
        self._config, self._replicas, self._coordinator = config, replicas, coordinator
        registry = open_registry(config.registry)
        self._book = book = ReleaseBook(release.deployment)
        book.begin(release)
        usages = shared_usages(coordinator) if coordinator else None
        self._admission = AdmissionController(config, book.newest() or release, registry, usages)
        self._records = ServingRecords(registry, release.deployment)
        self._metrics, self._traces = FrontMetrics(config.model), Traces(config.traces, config.model, "front")
        answering = VllmAnswering if config.engine.kind == "vllm" else SlotAnswering
        self._answering = answering(replicas, self._records)
        self._metrics.serves(self._release_of.generation)
        if coordinator:
            return
        self._records.hold(self._release_of)
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
        if self._coordinator is None:
            return await self._rollout.to(wanted)
        with raise_cause(InputError):
            done: Release = await self._coordinator.roll_out.remote(wanted)
        return done

    async def adopt(self, release: Release) -> None:
        """Not a route: the coordinator has committed this release."""
        self._adopt(release)

    def _adopt(self, release: Release | None) -> None:
        if release is not None and release.generation > self._release_of.generation:
            self._admission.release = release

    def reconfigure(self, about: dict[str, Any]) -> None:
        """Serve wants this of a deployment with a `user_config`, which here says what runs and changes nothing."""

    def check_health(self) -> None:
        """Serve asks this every few seconds."""
        if self._coordinator is not None:
            self._adopt(self._book.newest())  # committed while this front started, or could not be reached
        self._metrics.serves(self._release_of.generation)

    @api.post("/v1/chat/completions", openapi_extra=_takes(CHATS))
    async def chat(self, request: HttpRequest) -> Response:
        return await self._complete(request, CHATS)

    @api.post("/v1/completions", openapi_extra=_takes(TEXTS))
    async def complete(self, request: HttpRequest) -> Response:
        return await self._complete(request, TEXTS)

    @api.post("/v1/embeddings", include_in_schema=False)
    @api.post("/v1/responses", include_in_schema=False)
    async def unserved(self, request: HttpRequest) -> Response:
        await self._admission.identify(_route(request), request.headers)
        raise ApiError(404, f"{_route(request)} is not served here: {UNSERVED[_route(request)]}", code="not_served")

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
        return preferences_card(self._config.model, caller, presets)

    @api.get("/healthz")
    async def health(self) -> Health:
        """200 while every replica answers, with their engines' counters; asked past the queue, so also under load."""
        try:
            replicas = await self._replicas.broadcast("status").results_async(timeout_s=HEALTH_SECONDS)
        except DeploymentUnavailableError:
            replicas = []
        except Exception as error:
            raise ApiError(503, "a replica does not answer", code="unavailable") from error
        if not replicas and self._config.replicas.min:
            raise ApiError(503, "no replica is running", code="unavailable")
        return Health(status="ok" if replicas else "idle", replicas=replicas)

    async def _complete(self, request: HttpRequest, bodies: Bodies) -> Response:
        async def read() -> bytes:
            return await self._body(request)

        began, kind = asyncio.get_running_loop().time(), bodies[self._config.engine.kind]
        trace = self._traces.begin(f"POST {_route(request)}", request.headers, server=True)
        try:
            entry = await self._admission.admit(_route(request), request.headers, read, kind)
        except ApiError as error:
            self._metrics.refused(error.status)
            trace.end(error.status)
            raise
        except BaseException:  # a cancelled request: its caller has gone
            trace.end(HUNG_UP)
            raise
        if carrier := trace.carrier:
            entry = replace(entry, request=replace(entry.request, trace=carrier))
            trace.note(entry.traced)
        body = entry.body
        measure = self._metrics.admitted(body.model, free=bool(body.preferences), answers=body.answers, trace=trace)
        return await self._answering.answer(entry, measure, began + entry.seconds)

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
    return application(args, checked(args, uuid.uuid4().hex[:12]))


def checked(config: ServingConfig, deployment: str) -> Release:
    """What `application` is to serve, under this identity. Raises InputError as `build_app`, and needs no cluster
    unless the registry is there. Identity and config can be read from the running application (`instance.py`), by
    whoever wants to deploy under the same name."""
    config = config.absolute()
    check_traces(config.traces)
    if config.engine.kind == "vllm":
        if find_spec("vllm") is None:
            raise InputError(
                "engine.kind: vllm, but vLLM is not installed here; see docs/serving.md, or leave 'kind' out"
            )
        from prefvec_ray.serving.engines.vllm.options import llm_config

        llm_config(config)
    release = replace(resolve_release(config), deployment=deployment)
    # Keys and audit are checked here, before anything is deployed.
    AdmissionController(config, release, open_registry(config.registry))
    return release


def application(config: ServingConfig, release: Release) -> serve.Application:
    """The application for what `checked` has found. For vLLM, Ray is started where this process is in no cluster."""
    config = config.absolute()
    replicas = _vllm_replicas(config, release) if config.engine.kind == "vllm" else _slot_replicas(config, release)
    parts = [replicas]
    if config.ingress_replicas > 1:
        about = serve.deployment(Coordinator, name="coordinator").options(
            logging_config=_logs(config), max_ongoing_requests=MOST_ASKED, ray_actor_options={"num_cpus": 0}
        )
        parts.append(about.bind(config, release, replicas))
    front = serve.deployment(Front, name="front").options(
        num_replicas=config.ingress_replicas,
        user_config={"deployment": release.deployment, "config": config.model_dump(mode="json")},
        logging_config=_logs(config),
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=config.limits.seconds,  # as its replicas: it holds the answers' connections
        ray_actor_options={"num_cpus": 0},  # with one replica an endpoint fits on one CPU
    )
    return front.bind(config, release, *parts)


def _slot_replicas(config: ServingConfig, release: Release) -> serve.Application:
    from prefvec_ray.serving.replica import Replica  # brings torch, which the front does without

    wanted = config.replicas
    resources = {"ray_actor_options": {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}}
    replica = serve.deployment(Replica, name=_replica_name(config, release)).options(**_scale(config), **resources)
    return replica.bind(config, release, ReleaseBook(release.deployment))


def _vllm_replicas(config: ServingConfig, release: Release) -> serve.Application:
    """Ray Serve LLM's deployment: it says what a replica's ranks need, and where they go."""
    from ray.serve.llm import build_llm_deployment

    from prefvec_ray.serving.engines.vllm.options import llm_config
    from prefvec_ray.serving.vllm_server import PreferenceServer

    application: serve.Application = build_llm_deployment(
        llm_config(config),
        deployment_cls=PreferenceServer,
        bind_kwargs={"config": config, "release": release, "book": ReleaseBook(release.deployment)},
        override_serve_options={"name": _replica_name(config, release)} | _scale(config),
    )
    return application


def _replica_name(config: ServingConfig, release: Release) -> str:
    """While Serve puts new replicas in the place of old ones, the new front may ask the old replicas, and the old front
    the new. They learn each other's vectors; another base, or another engine, must be another deployment to Serve."""
    engine = hashlib.blake2b(config.engine.model_dump_json().encode() + release.served_base.encode(), digest_size=4)
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
    }
    if config.engine.mode == "merged" or config.engine.kind == "vllm":
        router = SettingRouter if config.engine.mode == "merged" else PrefixRouter
        options["request_router_config"] = RequestRouterConfig(request_router_class=router)
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

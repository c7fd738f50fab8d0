"""What several fronts of one endpoint share: the rates of their callers, and what is served.

An endpoint with `ingress_replicas: 1` needs none of this: its front counts and rolls out itself. With more, each front
admits, streams and audits by itself, and asks the coordinator twice for each request of a caller that has limits. While
the coordinator cannot be reached, such requests are refused (503); callers without limits are not affected. A
coordinator that Serve restarts counts from zero, as the one front does.
"""

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from grpc import RpcError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from prefvec_ray.registry import open_registry
from prefvec_ray.serving.access.errors import ApiError, one_line
from prefvec_ray.serving.access.usage import Usage, Usages, local_usages
from prefvec_ray.serving.config import Allowance, ServingConfig
from prefvec_ray.serving.http.admission import AdmissionController
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.release.rollout import ReleaseBook, RollOut

log = logging.getLogger("ray.serve")

ASK_SECONDS = 5.0
"""for the coordinator to answer a front"""
ADOPT_SECONDS = 30.0
"""for every front to serve a committed release; one that takes longer finds it at its next health check"""
GONE_SECONDS = 60.0
"""beyond its deadline, after which a request's front counts as gone and its place is free"""


class Coordinator:
    """One for each endpoint with several fronts; Serve keeps it running. It holds no model."""

    def __init__(self, config: ServingConfig, release: Release, replicas: DeploymentHandle):
        registry, book = open_registry(config.registry), ReleaseBook(release.deployment)
        self._config, self._usages = config, local_usages()
        self._open: OrderedDict[str, tuple[float, Usage]] = OrderedDict()
        self._admission = AdmissionController(config, book.newest() or release, registry)
        self._records = ServingRecords(registry, release.deployment)
        self._records.hold(self._admission.release)
        self._rollout = RollOut(config, registry, book, self._admission, self._records, replicas, self._adopted)
        if config.follow_seconds:
            self._following = asyncio.get_running_loop().create_task(self._rollout.follow(config.follow_seconds))

    def __del__(self) -> None:
        self._records.close()

    async def roll_out(self, wanted: ServingConfig) -> Release:
        """See `RollOut.to`. When it returns, every front admits under the new release."""
        return await self._rollout.to(wanted)

    async def _adopted(self, release: Release) -> None:
        fronts = serve.get_deployment_handle("front", serve.get_replica_context().app_name)
        try:
            await fronts.broadcast("adopt", release).results_async(timeout_s=ADOPT_SECONDS)
        except (RayError, RayServeException, RpcError, TimeoutError) as error:
            log.warning("a front will serve generation %d a little later: %s", release.generation, one_line(error))

    # --- rates: an ApiError is returned, since what a call raises arrives as an error of Ray's ------------------------

    async def begin(self, request: str, caller: str, allowance: Allowance) -> ApiError | None:
        """A request of this id begins at some front."""
        now = asyncio.get_running_loop().time()
        self._forget(now - self._config.limits.seconds - GONE_SECONDS)
        try:
            self._open[request] = now, await self._usages(caller, allowance)
        except ApiError as error:
            return error
        return None

    async def reserve(self, request: str, tokens: int) -> Mapping[str, str] | ApiError:
        """See `Usage.reserve`."""
        found = self._open.get(request)
        if found is None:  # begun before this coordinator was restarted
            return _cannot_count()
        try:
            return await found[1].reserve(tokens)
        except ApiError as error:
            return error

    async def end(self, request: str, used: int | None) -> None:
        """See `Usage.end`."""
        if found := self._open.pop(request, None):
            found[1].end(used)

    async def refuse(self, request: str, tokens: int) -> None:
        """See `Usage.refuse`."""
        if found := self._open.pop(request, None):
            found[1].refuse(tokens)

    def _forget(self, before: float) -> None:
        """Ends the requests of fronts that died: no request lives so long."""
        while self._open and next(iter(self._open.values()))[0] < before:
            _, (_, usage) = self._open.popitem(last=False)
            usage.end(None)


class _SharedUsage:
    """See `Usage`: counted by the coordinator."""

    def __init__(self, coordinator: DeploymentHandle, request: str, allowance: Allowance):
        self._coordinator, self._request = coordinator, request
        self.counted = allowance.counts_tokens

    async def reserve(self, tokens: int) -> Mapping[str, str]:
        headers: Mapping[str, str] = await _asked(self._coordinator.reserve.remote(self._request, tokens))
        return headers

    def end(self, used: int | None) -> None:
        _send(self._coordinator.end.remote(self._request, used))

    def refuse(self, tokens: int = 0) -> None:
        _send(self._coordinator.refuse.remote(self._request, tokens))


def shared_usages(coordinator: DeploymentHandle) -> Usages:
    """Of all fronts together. Nothing is counted of callers without limits, so they need no coordinator."""
    unlimited = local_usages()

    async def begin(caller: str, allowance: Allowance) -> Usage:
        if not allowance.is_limited:
            return await unlimited(caller, allowance)
        request = uuid.uuid4().hex
        try:
            await _asked(coordinator.begin.remote(request, caller, allowance))
        except asyncio.CancelledError:  # its caller has gone: the coordinator may have begun it
            _send(coordinator.refuse.remote(request, 0))
            raise
        return _SharedUsage(coordinator, request, allowance)

    return begin


async def _asked(call: DeploymentResponse[Any]) -> Any:
    """What the coordinator says. Raises ApiError: what it refused with, or 503 where it does not answer."""
    try:
        async with asyncio.timeout(ASK_SECONDS):
            said = await call
    except (RayError, RayServeException, RpcError, TimeoutError) as error:
        log.warning("the coordinator does not answer: %s", one_line(error))
        raise _cannot_count() from None
    if isinstance(said, ApiError):
        raise said
    return said


_sent: set["asyncio.Task[None]"] = set()


def _send(call: DeploymentResponse[Any]) -> None:
    """Have the coordinator told, without a wait. What is lost with it is forgotten after the request's deadline."""

    async def send() -> None:
        try:
            await call
        except (RayError, RayServeException, RpcError) as error:
            log.warning("the coordinator was not told of a request's end: %s", one_line(error))

    task = asyncio.get_running_loop().create_task(send())
    _sent.add(task)
    task.add_done_callback(_sent.discard)


def _cannot_count() -> ApiError:
    return ApiError(503, "the server cannot count this request now; try again", code="unavailable")

"""A port of its own for an endpoint whose cluster's Serve listens elsewhere.

Ray Serve has one HTTP port a cluster. The first endpoint gets it, under the route `/`. Every further one runs under a
route of its own (`/prefvec/<name>`) on Serve's port, and an actor of this module listens on the port that its user
asked for and forwards to that route. Streams pass through as they come, and a caller that hangs up ends its request.
"""

import asyncio
import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import ray
import uvicorn
import yarl
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from starlette.types import ASGIApp, Receive, Scope, Send

from prefvec_ray.common.cluster import NAMESPACE
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.http.middleware import ProxyMiddleware

PREFIX = "/prefvec"
CONNECT_SECONDS = 10.0
START_SECONDS = 120.0
STOP_SECONDS = 15.0
FREE_SECONDS = 5.0
HOP_BY_HOP = {
    b"connection",
    b"expect",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
"""headers that belong to one connection, not to the request (RFC 9110, 7.6.1)"""


class Address(NamedTuple):
    """Where an endpoint listens."""

    host: str
    port: int


class Forward:
    """An ASGI application that answers with what `target` (`http://host:port`) answers under `route`.

    Paths that begin with the route already are passed on as they are: the application writes such links.
    """

    def __init__(self, target: str, route: str):
        self._target, self._route = target, route
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue(16)
        reading = asyncio.create_task(_read(receive, pieces))
        answering = asyncio.create_task(self._answer(scope, pieces, send))
        done, rest = await asyncio.wait({reading, answering}, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:  # the caller hung up, or the answer is complete
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for task in done:
            task.result()

    async def _answer(self, scope: Scope, pieces: "asyncio.Queue[bytes | None]", send: Send) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in _end_to_end(scope["headers"])]
        names = {name for name, _ in scope["headers"]}
        body = _body(pieces) if names & {b"content-length", b"transfer-encoding"} else None
        request = self._client().request(scope["method"], self._url(scope), headers=headers, data=body)
        try:
            response = await request
        except (aiohttp.ClientError, OSError):
            await _unavailable(send)
            return
        async with response:
            passed = [(name.lower(), value) for name, value in _end_to_end(response.raw_headers)]
            await send({"type": "http.response.start", "status": response.status, "headers": passed})
            async for piece in response.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    def _url(self, scope: Scope) -> yarl.URL:
        path = scope["raw_path"].decode("latin-1")
        if path != self._route and not path.startswith(f"{self._route}/"):
            path = self._route + path
        query = scope["query_string"].decode("latin-1")
        return yarl.URL(f"{self._target}{path}{'?' if query else ''}{query}", encoded=True)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:  # made in the loop that uses it
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
                max_field_size=65_536,
                max_line_size=65_536,
            )
        return self._session


async def _read(receive: Receive, pieces: "asyncio.Queue[bytes | None]") -> None:
    """The request's body into the queue, None at its end; returns when the caller has gone."""
    while (message := await receive())["type"] != "http.disconnect":
        await pieces.put(message.get("body", b""))
        if not message.get("more_body"):
            await pieces.put(None)


async def _body(pieces: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
    while (piece := await pieces.get()) is not None:
        yield piece


def _end_to_end(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


async def _unavailable(send: Send) -> None:
    message = "the endpoint does not answer now; try again"
    error = {"message": message, "type": "server_error", "code": "unavailable", "param": None}
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


class Ingress:
    """The actor that listens. Use it through `open_ingress` and `close_ingress`."""

    def __init__(self, host: str, port: int, target: str, route: str):
        self._about = {"host": host, "port": port, "target": target, "route": route}
        app: ASGIApp = ProxyMiddleware(Forward(target, route))
        settings = uvicorn.Config(
            app, lifespan="off", ws="none", log_config=None, server_header=False, date_header=False, access_log=False
        )
        listening = _bind_soon(host, port)
        threading.Thread(target=uvicorn.Server(settings).run, args=([listening],), daemon=True).start()

    def about(self) -> dict[str, Any]:
        """host, port, target, route."""
        return self._about


def _bind_soon(host: str, port: int) -> socket.socket:
    """`bind`, tried for a moment: the process that had the port may be ending."""
    until = time.monotonic() + FREE_SECONDS
    while True:
        try:
            return bind(host, port)
        except InputError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, not yet listening. InputError where the address cannot be used."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"host {host}: {error.strerror or error}; give an address of this machine") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        return found
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} on {host} is taken by another program; choose another --port") from None
        raise InputError(f"port {port} on {host}: {error.strerror}; choose another --host or --port") from None


def open_ingress(name: str, address: Address, target: str, route: str) -> None:
    """Listen at `address` on this node for the application `name`, until `close_ingress`. Joins one that does already.

    Raises InputError where the address cannot be used.
    """
    about = {"host": address.host, "port": address.port, "target": target, "route": route}
    if _about(name) == about:
        return
    close_ingress(name)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _actor(name), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    actor = ray.remote(Ingress).options(**options, max_restarts=-1, scheduling_strategy=here).remote(**about)
    try:
        ray.get(actor.about.remote(), timeout=START_SECONDS)
    except ray.exceptions.RayError as error:
        close_ingress(name)
        lines = [line for line in str(error).splitlines() if "InputError: " in line]
        if lines:
            raise InputError(lines[-1].partition("InputError: ")[2]) from None
        raise


def ingress_address(name: str) -> Address | None:
    """Where the ingress of an application listens; None where it has none."""
    about = _about(name)
    return Address(about["host"], about["port"]) if about else None


def close_ingress(name: str) -> None:
    """Stop listening for the application `name`; does nothing where nobody listens."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(_actor(name), NAMESPACE), no_restart=True)
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until:
            ray.get_actor(_actor(name), NAMESPACE)
            time.sleep(0.05)


def _about(name: str) -> dict[str, Any] | None:
    try:
        actor = ray.get_actor(_actor(name), NAMESPACE)
        return ray.get(actor.about.remote(), timeout=STOP_SECONDS)
    except (ValueError, ray.exceptions.RayError):
        return None


def _actor(name: str) -> str:
    return f"prefvec-ingress-{name}"

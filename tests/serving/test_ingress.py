"""The ingress before a real server: what passes through it is what the server said, as it said it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.http.ingress import Ingress, bind
from tests.conftest import free_port

ROUTE = "/prefvec/bob"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def upstream() -> Iterator[SimpleNamespace]:
    """A server with routes under `ROUTE`, and an ingress before it: `url`."""
    seen = SimpleNamespace(ended=threading.Event(), step=threading.Event())

    async def echo(request: Request) -> Response:
        body = (await request.body()).decode()
        about = {"path": request.url.path, "query": request.url.query, "body": body, "method": request.method}
        answer = JSONResponse(about | {"headers": dict(request.headers)}, 201, {"x-said": "so"})
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    async def stream(request: Request) -> Response:
        async def pieces():
            try:
                yield b"data: first\n\n"
                while not seen.step.is_set():
                    await asyncio.sleep(0.01)
                yield b"data: second\n\n"
            finally:
                seen.ended.set()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def early(request: Request) -> Response:
        return JSONResponse({"error": "too slow"}, 408)  # without reading the body

    routes = [
        Route(f"{ROUTE}/stream", stream),
        Route(f"{ROUTE}/early", early, methods=["POST"]),
        Route(f"{ROUTE}/{{rest:path}}", echo, methods=["GET", "POST", "HEAD"]),
    ]
    listening = bind("127.0.0.1", free_port())
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    port = free_port()
    Ingress("127.0.0.1", port, f"http://127.0.0.1:{listening.getsockname()[1]}", ROUTE)
    seen.url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status(seen.url) == 201)
    yield seen
    server.should_exit = True
    thread.join(10)


def status(url: str) -> int | None:
    """None where nobody listens."""
    try:
        return httpx.get(f"{url}/up").status_code
    except httpx.TransportError:
        return None


def test_a_request_and_its_answer_pass_whole(upstream):
    told = httpx.post(f"{upstream.url}/v1/a%2Fb?x=1&y=%20", content=b"text", headers={"x-request-id": "7"})
    about = told.json()
    assert (told.status_code, told.headers["x-said"], len(told.headers.get_list("set-cookie"))) == (201, "so", 2)
    assert (about["method"], about["body"], about["query"]) == ("POST", "text", "x=1&y=%20")
    assert about["path"] == f"{ROUTE}/v1/a%2Fb" or about["path"] == f"{ROUTE}/v1/a/b"
    assert about["headers"]["x-request-id"] == "7"
    assert about["headers"]["host"] == upstream.url.removeprefix("http://")
    assert httpx.get(f"{upstream.url}{ROUTE}/docs").json()["path"] == f"{ROUTE}/docs", "links with the route in them"
    assert httpx.head(f"{upstream.url}/v1").status_code == 201

    def chunks() -> Iterator[bytes]:
        yield from (b"in ", b"chunks")

    assert httpx.post(f"{upstream.url}/v1", content=chunks()).json()["body"] == "in chunks"


def test_a_stream_comes_piece_by_piece_and_ends_with_its_caller(upstream):
    upstream.step.clear()
    upstream.ended.clear()
    with httpx.stream("GET", f"{upstream.url}/stream", timeout=60) as told:
        pieces = told.iter_raw()
        assert next(pieces) == b"data: first\n\n", "before the second exists"
        upstream.step.set()
        assert b"".join(pieces) == b"data: second\n\n"
    upstream.step.clear()
    upstream.ended.clear()
    with httpx.stream("GET", f"{upstream.url}/stream", timeout=60) as told:
        next(told.iter_raw())
    assert upstream.ended.wait(60), "the caller hung up, so the server's work ends"


def test_an_answer_that_does_not_wait_for_the_body_comes_at_once(upstream):
    host, port = upstream.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as caller:
        caller.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nonly a little")
        assert caller.recv(100).startswith(b"HTTP/1.1 408")


def test_a_server_that_is_gone_is_a_503(upstream):
    port = free_port()
    Ingress("127.0.0.1", port, f"http://127.0.0.1:{free_port()}", ROUTE)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status(url) is not None)
    told = httpx.get(f"{url}/v1")
    assert (told.status_code, told.json()["error"]["code"]) == (503, "unavailable")


def test_an_address_that_cannot_be_used_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is taken by another program; choose another"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match=r"host no\.such\.host: .*; give an address of this machine"):
        bind("no.such.host", 8000)
    with pytest.raises(InputError, match=r"port 8000 on 192\.0\.2\.1: "):
        bind("192.0.2.1", 8000)

"""The proxy's middleware alone: what reaches Serve, and what is refused before it."""

import asyncio
from typing import Any

import pytest
from ray.serve._private.constants import SERVE_SESSION_ID

from prefvec_ray.serving.http import middleware
from prefvec_ray.serving.http.middleware import ProxyMiddleware


class Serve:
    """Stands where Serve's proxy stands: reads the whole body, then answers."""

    def __init__(self, status: int = 200):
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.gone = False
        self._status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                return
            self.body += message["body"]
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": self._status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Upload:
    """One request, whose body comes in parts when `feed` is called."""

    def __init__(self, app: Any, *, headers: Any = (), client: str = "1.2.3.4", path: str = "/v1/completions"):
        self.sent: list[dict[str, Any]] = []
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "path": path, "headers": list(headers), "client": (client, 1)}
        self.task = asyncio.create_task(app(scope, self._parts.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def feed(self, part: bytes, *, more: bool = True) -> None:
        self._parts.put_nowait({"type": "http.request", "body": part, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


async def answered(app: Any, **how: Any) -> Upload:
    upload = Upload(app, **how)
    await upload.feed(b"{}", more=False)
    await upload.task
    return upload


SPELLINGS = [
    "Serve-Multiplexed-Model-Id",
    "serve_multiplexed_model_id",
    "SERVE_Multiplexed-model_ID",
    "X-Session-Id",
    "x_session_id",
    "X-Request-Timeout-Seconds",
    "x_request_timeout_seconds",
    "X-Request-Disconnect-Disabled",
    "x-request_disconnect-disabled",
    SERVE_SESSION_ID,
]


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_spelling_of_serves_own_headers_gets_through(name):
    serve = Serve()
    pairs = [(name.lower().encode(), b"mine"), (name.encode(), b"mine"), (b"x-other", b"kept")]
    asyncio.run(answered(ProxyMiddleware(serve), headers=pairs))
    assert serve.headers == [(b"x-other", b"kept")]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([(b"x-request-id", b"r1")], True),
        ([(b"x-request-id", b"r" * 129)], False),
        ([(b"x-request-id", b"a\x1b[2Kb")], False),
        ([(b"x-request-id", b"two words")], False),
        ([(b"x-request-id", "\u202e".encode())], False),
        ([(b"x_request_id", b"r1")], False),
    ],
)
def test_a_request_id_that_logs_can_hold_or_none(given, kept):
    serve = Serve()
    asyncio.run(answered(ProxyMiddleware(serve), headers=given))
    assert serve.headers == (given if kept else [])


@pytest.mark.parametrize("path", ["/v1/\nERROR forged", "/v1/\x1b[2K", "/\x00", "/\u202egnp"])
def test_a_path_that_would_forge_a_line_of_the_log_is_not_found(path):
    serve = Serve()
    upload = asyncio.run(answered(ProxyMiddleware(serve), path=path))
    assert (upload.status, serve.headers) == (404, [])


def test_one_caller_has_so_many_unfinished_bodies_and_others_have_theirs(monkeypatch):
    monkeypatch.setattr(middleware, "UPLOADS_PER_CALLER", 3)
    monkeypatch.setattr(middleware, "UPLOADS", 5)

    async def attack() -> None:
        app = ProxyMiddleware(Serve())
        slow = [Upload(app) for _ in range(3)]
        for upload in slow:
            await upload.feed(b"{")
        assert (await answered(app)).status == 429
        assert (await answered(app, client="5.6.7.8")).status == 200
        others = [Upload(app, client=f"9.9.9.{i}") for i in range(2)]
        for upload in others:
            await upload.feed(b"{")
        assert (await answered(app, client="5.6.7.8")).status == 503
        for upload in slow + others:
            await upload.feed(b"}", more=False)
            await upload.task
            assert upload.status == 200
        assert (await answered(app)).status == 200
        assert not app._uploads.open
        assert not app._uploads.bytes

    asyncio.run(attack())


def test_unfinished_bytes_are_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(middleware, "UPLOAD_BYTES_PER_CALLER", 1000)
    monkeypatch.setattr(middleware, "BODY_BYTES", 900)

    async def attack() -> None:
        serve = Serve()
        app = ProxyMiddleware(serve)
        first, second, third = Upload(app), Upload(app), Upload(app)
        await first.feed(b"x" * 600)
        await second.feed(b"x" * 600)
        await second.task
        assert second.status == 429
        assert serve.gone, "Serve ends its work on it, as for a caller that hung up"
        await first.feed(b"x" * 400)
        await first.task
        assert first.status == 413
        await third.feed(b"x" * 900, more=False)
        await third.task
        assert third.status == 200
        assert not app._uploads.bytes

    asyncio.run(attack())


def test_who_is_refused_without_end_waits_and_nobody_else(monkeypatch):
    monkeypatch.setattr(middleware, "REFUSALS_AT_ONCE", 5)
    monkeypatch.setattr(middleware, "REFUSALS_PER_SECOND", 1e-3)

    async def attack() -> None:
        app = ProxyMiddleware(Serve(status=400))
        for _ in range(5):
            assert (await answered(app)).status == 400
        waiting = [Upload(app) for _ in range(3)]
        for upload in waiting:
            await upload.feed(b"{}", more=False)
        assert [upload.status for upload in waiting] == [None] * 3
        assert (await answered(app, client="5.6.7.8")).status == 400
        assert app._uploads.open.total() == 3, "who waits counts among the unfinished"
        for upload in waiting:
            upload.task.cancel()
        await asyncio.gather(*(upload.task for upload in waiting), return_exceptions=True)
        assert not app._uploads.open
        good = ProxyMiddleware(Serve())
        for _ in range(20):
            assert (await answered(good)).status == 200

    asyncio.run(attack())


def test_refusals_are_forgotten_with_time_and_large_ones_count_for_more():
    now = [100.0]
    refusals = middleware.Refusals(lambda: now[0])
    refusals.add("a", middleware.REFUSALS_AT_ONCE - 1)
    assert refusals.wait("a") == refusals.wait("b") == 0
    refusals.add("a", 11)
    assert refusals.wait("a") == pytest.approx(11 / middleware.REFUSALS_PER_SECOND)
    now[0] += 11 / middleware.REFUSALS_PER_SECOND + 1e-6
    assert refusals.wait("a") == 0
    refusals.add("a", 1e9)
    assert refusals.wait("a") <= middleware.LONGEST_WAIT + 1 / middleware.REFUSALS_PER_SECOND


def test_a_body_that_says_it_is_too_large_is_not_begun():
    serve = Serve()
    for length in (b"16000001", b"9" * 5000):
        upload = asyncio.run(answered(ProxyMiddleware(serve), headers=[(b"content-length", length)]))
        assert (upload.status, serve.body) == (413, b"")


def test_a_caller_that_is_answered_before_its_body_came_is_not_listened_to_any_more():
    class Early:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"Connection", b"keep-alive")]})
            await send({"type": "http.response.body", "body": b""})

    async def attack() -> None:
        app = ProxyMiddleware(Early())
        upload = Upload(app)
        await upload.task
        assert upload.sent[0]["headers"] == [(b"connection", b"close")]
        assert not app._uploads.open

    asyncio.run(attack())

"""What Serve's HTTP proxy lets in: a middleware before all of Serve's own handling.

    # before `ray start`
    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=prefvec_ray.serving.http.middleware:middlewares

`prefvec serve` and `prefvec_ray.serving.start` set it for clusters that they start. Without it Serve's proxy answers
500 to headers that are no UTF-8, takes any size of them, keeps bodies of any size and number in its memory, routes by
headers that a caller writes, and lets a caller switch off that its work ends when it hangs up.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.serve._private.constants import SERVE_SESSION_ID
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefvec_ray.serving.config import BODY_BYTES

HEADER_BYTES = 32_768
UPLOADS, UPLOADS_PER_CALLER = 512, 128
"""bodies that may be on their way at once: in all, and of one caller"""
UPLOAD_BYTES, UPLOAD_BYTES_PER_CALLER = 128_000_000, 32_000_000
"""bytes of such unfinished bodies"""
REFUSALS_PER_SECOND = float(os.environ.get("PREFVEC_REFUSALS_PER_SECOND", "10"))
"""of one caller, once its first REFUSALS_AT_ONCE are used up: its further requests wait. A refused body counts as one
more for every REFUSED_BYTES of it"""
REFUSALS_AT_ONCE = 50
REFUSED_BYTES = 100_000
LONGEST_WAIT = 10.0
"""seconds"""
MOST_CALLERS = 10_000
"""whose refusals are remembered before those that are long over are forgotten"""
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def _spelling(name: bytes) -> bytes:
    """A header's name as Serve compares it: neither case nor `-` against `_` makes a difference."""
    return name.lower().replace(b"-", b"_")


SERVES_OWN = {
    _spelling(name)
    for name in (
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve-multiplexed-model-id",
        SERVE_SESSION_ID.encode(),  # an operator may have given it another name
    )
}
"""headers by which Serve takes orders; callers have none to give"""


class Uploads:
    """The bodies that are on their way: their number and bytes, by caller and in all."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def begin(self, caller: str) -> tuple[int, str] | None:
        """Count one more body. The refusal (HTTP status and message) instead, where there are too many already."""
        if self.open[caller] >= UPLOADS_PER_CALLER:
            return 429, f"{UPLOADS_PER_CALLER} of your requests are still being sent; finish some first"
        if self.open.total() >= UPLOADS or self.bytes.total() >= UPLOAD_BYTES:
            return 503, "the server is taking in too many requests; try again soon"
        self.open[caller] += 1
        return None

    def add(self, caller: str, size: int) -> bool:
        """Count bytes that came. False where they are more than may be kept."""
        self.bytes[caller] += size
        return self.bytes[caller] <= UPLOAD_BYTES_PER_CALLER and self.bytes.total() <= UPLOAD_BYTES

    def end(self, caller: str, size: int) -> None:
        """A body that came whole, or was given up, after `size` bytes."""
        self.open[caller] -= 1
        self.bytes[caller] -= size
        for counter in (self.open, self.bytes):
            if not counter[caller]:
                del counter[caller]


class Refusals:
    """Paces callers whose requests are refused, each by itself: who repeats them without a pause waits, and the others
    have the processors. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._debts: dict[str, tuple[float, float]] = {}
        self._lines: dict[str, asyncio.Lock] = {}

    async def turn(self, caller: str) -> bool:
        """Wait until this caller's next request may go on. True where it had to: then it is counted as refused
        already, until `add` takes that back."""
        if not self.wait(caller):
            return False
        line = self._lines.setdefault(caller, asyncio.Lock())
        async with line:
            while seconds := self.wait(caller):
                await asyncio.sleep(seconds)
            self.add(caller, 1.0)
        if not line.locked() and self._lines.get(caller) is line:
            del self._lines[caller]
        return True

    def wait(self, caller: str) -> float:
        """Seconds until this caller may be refused once more."""
        return max(0.0, self._debt(caller) + 1 - REFUSALS_AT_ONCE) / REFUSALS_PER_SECOND

    def add(self, caller: str, refusals: float) -> None:
        """Count so many, or take so many back."""
        most = REFUSALS_AT_ONCE + LONGEST_WAIT * REFUSALS_PER_SECOND
        self._debts[caller] = min(most, max(0.0, self._debt(caller) + refusals)), self._clock()
        if len(self._debts) > MOST_CALLERS:
            self._debts = {name: debt for name, debt in self._debts.items() if self._debt(name)}

    def _debt(self, caller: str) -> float:
        debt, at = self._debts.get(caller, (0.0, 0.0))
        return max(0.0, debt - (self._clock() - at) * REFUSALS_PER_SECOND)


class _Body:
    """One request's body on its way through the middleware."""

    def __init__(self, uploads: Uploads, caller: str, receive: Receive, send: Send):
        self._uploads, self._caller, self._receive, self._send = uploads, caller, receive, send
        self._size = self._counted = 0
        self._closed = False
        self.refusal: tuple[int, str] | None = None
        self.status = 0
        """of the answer; 0: none yet"""

    async def receive(self) -> Message:
        """The next part. Where there are too many bytes: that the caller has gone, which ends Serve's work on it."""
        if self.refusal:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] != "http.request":
            self.close()
        elif not self._closed:
            part = len(message.get("body", b""))
            self._size += part
            if self._size > BODY_BYTES:
                self.refusal = 413, f"the body is larger than {BODY_BYTES} bytes; shorten it"
            else:
                self._counted += part
                if not self._uploads.add(self._caller, part):
                    self.refusal = 429, "too many bytes of your requests are on their way; finish some first"
            if self.refusal:
                self.close()
                return {"type": "http.disconnect"}
            if not message.get("more_body"):
                self.close()
        return message

    async def send(self, message: Message) -> None:
        """The answer. Where it comes before the whole body, the rest of that is not waited for."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self._closed:
                kept = [pair for pair in message.get("headers", []) if bytes(pair[0]).lower() != b"connection"]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
        await self._send(message)

    def refusals(self) -> float:
        """What this request counts as, where it was refused; 0 where it was not."""
        refused = self.refusal or 400 <= self.status < 500
        return 1 + self._size / REFUSED_BYTES if refused else 0.0

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._uploads.end(self._caller, self._counted)


class ProxyMiddleware:
    """Refuses headers that are too large or no text and bodies that are too large or too many, in OpenAI's form, drops
    Serve's own headers, and paces callers whose requests are refused."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._uploads = Uploads()
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        caller = _caller(scope)
        if refusal := _wrong(scope["path"], headers) or self._uploads.begin(caller):
            await _refuse(send, *refusal)
            return
        body = _Body(self._uploads, caller, receive, send)
        counted = False
        try:
            counted = await self._refusals.turn(caller)
            await self._app({**scope, "headers": _kept(headers)}, body.receive, body.send)
        except Exception:
            if not body.refusal:
                raise
        finally:
            body.close()
            self._refusals.add(caller, body.refusals() - counted)
        if body.refusal and not body.status:
            await _refuse(send, *body.refusal)


def _wrong(path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """Status and message, where the request's head cannot be taken."""
    if not path.isprintable():  # it would be written into logs
        return 404, "Not Found"
    if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
        return 431, f"the headers are larger than {HEADER_BYTES} bytes; shorten them"
    try:
        for _, value in headers:
            value.decode()
    except UnicodeDecodeError:
        return 400, "a header is not UTF-8; correct it"
    length = next((value for name, value in headers if name.lower() == b"content-length"), b"0")
    if length.isdigit() and int(length[:20]) > BODY_BYTES:
        return 413, f"the body is larger than {BODY_BYTES} bytes; shorten it"
    return None


def _kept(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without Serve's own headers in any spelling, and without a request id that a log could not hold as it is."""
    return [
        (name, value)
        for name, value in headers
        if _spelling(name) not in SERVES_OWN
        and (_spelling(name) != b"x_request_id" or (name.lower() == b"x-request-id" and REQUEST_ID.fullmatch(value)))
    ]


def _caller(scope: Scope) -> str:
    """Whose upload it is: the address, and a digest of the key that is presented. The front refuses unknown keys
    before it reads their bodies, so that inventing keys makes no room."""
    keys = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    client: Any = scope.get("client")
    return f"{client[0] if client else ''} {hashlib.blake2b(b' '.join(keys), digest_size=16).hexdigest()}"


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "code": None, "param": None}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def middlewares() -> list[Middleware]:
    """What Serve's proxy asks for when it starts."""
    return [Middleware(ProxyMiddleware)]

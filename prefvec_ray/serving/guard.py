"""What Serve's HTTP proxy lets in: a middleware before all of Serve's own handling.

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=prefvec_ray.serving.guard:middlewares   # before `ray start`

`prefvec serve` and `prefvec_ray.serving.start` set it for clusters that they start. Without it Serve's proxy answers
500 to headers that are no UTF-8, takes any size of them, and lets a caller switch off that its work ends when it hangs
up.
"""

import json

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PATH = "prefvec_ray.serving.guard:middlewares"
HEADER_BYTES = 32_768
SERVES_OWN = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve_multiplexed_model_id",
}
"""headers by which Serve takes orders; callers have none to give"""


class Guard:
    """Refuses headers that are too large or no text, in OpenAI's form, and drops Serve's own."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
                return await _refuse(send, 431, f"the headers are larger than {HEADER_BYTES} bytes; shorten them")
            try:
                for _, value in headers:
                    value.decode()
            except UnicodeDecodeError:
                return await _refuse(send, 400, "a header is not UTF-8; correct it")
            scope = {**scope, "headers": [pair for pair in headers if pair[0].lower() not in SERVES_OWN]}
        return await self._app(scope, receive, send)


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "code": None, "param": None}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def middlewares() -> list[Middleware]:
    """What Serve's proxy asks for when it starts."""
    return [Middleware(Guard)]

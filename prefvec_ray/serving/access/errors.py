"""Errors in OpenAI's form: their status, and what of them a caller may see."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from grpc import RpcError
from openai.types.shared import ErrorObject
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import StoreError
from prefvec_ray.serving.access.policy import PreferenceError
from prefvec_ray.serving.engines.base import EngineError, PromptTooLongError

log = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An error for a caller: an HTTP status and OpenAI's error object, perhaps with headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.error = ErrorObject(message=message, type=kind, code=code, param=param)

    def __reduce__(self) -> tuple[Any, ...]:
        """From one process to another, whole."""
        kinds: dict[str, Any] = {"code": self.error.code, "param": self.error.param, "kind": self.error.type}
        return partial(ApiError, **kinds, headers=self.headers), (self.status, self.error.message)

    def body(self) -> dict[str, Any]:
        return {"error": self.error.model_dump(include={"message", "type", "code", "param"})}


async def _answer(request: HttpRequest, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), headers=error.headers)
    answer = explained(error)
    headers = {"retry-after": "1"} if answer.status == 503 else {}
    return JSONResponse(answer.body(), answer.status, headers | answer.headers)


def answer_in_openai_form(api: FastAPI) -> None:
    """Every error that leaves `api` has OpenAI's form, unknown routes and methods included."""
    for kind in (ApiError, HTTPException, Exception):
        api.add_exception_handler(kind, _answer)


def explained(error: Exception) -> ApiError:
    """The error as its caller may see it: all that they can correct, nothing of the server's inside."""
    match error:
        case ApiError():
            return error
        case PreferenceError():
            return ApiError(400, str(error), code=error.code, param=f"preferences.{error.preference}")
        case PromptTooLongError():
            return ApiError(400, _text(error), code="context_length_exceeded")
        case InputError():
            return ApiError(400, _text(error))
        case TimeoutError():
            return ApiError(504, "the answer took too long and was stopped; ask for less", code="timeout")
        case BackPressureError():
            return ApiError(503, "the server is busy; try again soon", code="overloaded")
        case RayServeException() | RayError() | RpcError() | EngineError() | StoreError():
            log.warning("could not answer: %s", one_line(error))
            return ApiError(503, "the server could not finish this request; try again", code="unavailable")
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "the server failed to answer this request")


def one_line(error: object, most: int = 2000) -> str:
    """The error's text for a log: no line ends and no control characters, whoever wrote part of it."""
    text = " ".join(str(error).split())[:most]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _text(error: Exception) -> str:
    """The message itself: an error from a replica arrives wrapped in its remote traceback."""
    return str(getattr(error, "cause", error))


def no_model(model: str, served: list[str]) -> ApiError:
    known = ", ".join(served)
    return ApiError(404, f"no model {model[:200]!a} here; served: {known}", code="model_not_found", param="model")

"""What callers are told of errors: what they can fix in full, everything else without its insides."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import StoreError
from prefvec_ray.serving.access.errors import ApiError, explained, one_line
from prefvec_ray.serving.access.policy import PreferenceError
from prefvec_ray.serving.engines.base import EngineError, PromptTooLongError


def from_a_replica(error: Exception) -> Exception:
    """As an exception arrives that was raised in another process."""
    return RayTaskError("stream", "Traceback: secret/path.py", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (ApiError(418, "tea", code="pot"), 418, "pot", "tea"),
        (PreferenceError("too low", "harmless", "low"), 400, "low", "too low"),
        (InputError("no tokens"), 400, None, "no tokens"),
        (from_a_replica(InputError("no tokens")), 400, None, "no tokens"),
        (from_a_replica(PromptTooLongError("too long")), 400, "context_length_exceeded", "too long"),
        (TimeoutError(), 504, "timeout", "took too long"),
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 503, "overloaded", "busy"),
        (ActorDiedError(), 503, "unavailable", "try again"),
        (StoreError("/secret/blob is damaged"), 503, "unavailable", "try again"),
        (EngineError("secret"), 503, "unavailable", "try again"),
        (from_a_replica(EngineError("secret")), 503, "unavailable", "try again"),
        (KeyError("secret"), 500, None, "failed to answer"),
    ],
)
def test_status_code_and_words(error, status, code, message):
    told = explained(error)
    assert (told.status, told.error.code) == (status, code)
    assert message in told.error.message
    assert "secret" not in str(told.body())
    assert told.error.type == ("invalid_request_error" if status < 500 else "server_error")


def test_an_errors_text_is_one_plain_line_of_the_log():
    forged = one_line(ValueError("bad\n2026-01-01 ERROR forged\r\x1b[2K\u202e\x00 end"))
    assert forged == "bad 2026-01-01 ERROR forged \\x1b[2K\\u202e\\x00 end"
    assert len(one_line("x" * 10_000)) == 2000

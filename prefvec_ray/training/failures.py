"""What the error of a failed Ray Train run means: whether another start is worth it, and the reason in a line."""

from typing import Any

import ray
from ray.train import ControllerError, PreemptionError, WorkerGroupError

from prefvec_ray.common.cluster import lost_because
from prefvec_ray.common.errors import JobError, from_traceback, message_lines

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # killed by Ray, since its node ran low on memory
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL Error",
    "DistBackendError",
    "EADDRINUSE",  # the port that Ray Train found free was taken before torch listened there
)
"""What gloo and NCCL raise on the other workers when one died, and when two runs met at one port."""

OWN = "prefvec_ray."


class RunsFailedError(JobError):
    """Some runs of a plan failed; the finished ones are kept and will be skipped next time."""


def worker_died(error: Exception) -> bool:
    """Whether a process was lost, while it trained (a worker group's failures) or while it was being set up.

    What the training itself raises comes as a worker group's failure: Ray Train's controller fails only by what happens
    around it, such as a call to a busy node that took too long. When one of several workers dies or stops the run for a
    reason, the others may be the first to fail, since their connection to it is closed.
    """
    failures = [_cause(error), *getattr(error, "worker_failures", {}).values()]
    if any(map(_is_own, failures)):
        return False
    if isinstance(error, (PreemptionError, ControllerError)) or any(isinstance(_cause(f), LOST) for f in failures):
        return True
    return any(sign in str(failure) for failure in failures for sign in COLLATERAL)


def failed_part(error: Exception) -> str:
    return "Ray Train failed" if isinstance(error, ControllerError) else "a worker was lost"


def _cause(failure: Any) -> Any:
    """What a failed health check found, or what failed in Ray Train's controller; any other failure itself."""
    for attribute in ("health_check_failure", "controller_failure"):
        failure = getattr(failure, attribute, failure)
    return failure


def lost_ranks(error: Exception) -> list[int]:
    """The ranks whose process is gone, not those that only lost their connection to it."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    return [rank for rank, failure in failures.items() if isinstance(_cause(failure), LOST)]


def failure_reason(error: Exception) -> str:
    """In a line, what the failing worker raised.

    Of several workers the one that raised an error of ours has the reason; the others only lost their connection.
    """
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    failures = failures or [error]
    return from_traceback(_line(next(filter(_is_own, failures), failures[0])))


def _lines(error: Exception) -> list[str]:
    return message_lines(error) or [type(error).__name__]


def _is_own(failure: Exception) -> bool:
    """Whether our code raised it: Ray Train hands over what a worker raised itself, its controller a traceback."""
    return type(failure).__module__.startswith(OWN) or _lines(failure)[-1].startswith(OWN)


def _line(failure: Exception) -> str:
    """What a worker raised, or the end of its traceback; of a lost process what Ray says of its end."""
    cause = _cause(failure)
    lines = _lines(cause)
    if isinstance(cause, LOST):
        return f"a process was lost: {lost_because(cause)}"
    if lines[0].startswith("Traceback"):
        return lines[-1]
    return lines[0] if _is_own(cause) else f"{type(cause).__name__}: {lines[0]}"

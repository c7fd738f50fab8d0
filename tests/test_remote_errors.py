"""An error that a task, an actor or a replica raised is raised here as it was, without Ray's traceback in its text."""

import pytest
from ray.exceptions import RayTaskError

from prefvec_ray.common.cluster import lost_because, raise_cause
from prefvec_ray.common.errors import InputError, JobError


def from_a_task(error: Exception) -> Exception:
    """As an exception arrives that was raised in another process."""
    return RayTaskError("work", "Traceback: secret/path.py", error).as_instanceof_cause()


def test_what_is_expected_is_raised_itself():
    with pytest.raises(InputError) as caught, raise_cause(InputError, JobError):
        raise from_a_task(InputError("no such vector"))
    assert type(caught.value) is InputError
    assert str(caught.value) == "no such vector"


@pytest.mark.parametrize("error", [from_a_task(KeyError("a bug")), ValueError("raised here")])
def test_all_else_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, raise_cause(InputError, JobError):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("The actor died.\n\tpid: 7\nThe actor is dead because its node has died. Id: ab", "its node has died. Id: ab"),
        ("The actor is temporarily unavailable: no route\nadvice", "The actor is temporarily unavailable: no route"),
        ("", "RuntimeError"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_a_lost_process_is_explained_in_a_line(message, said):
    assert lost_because(RuntimeError(message)) == said

"""What a failure in another process is reported as: the message alone."""

import click
import pytest
from click.testing import CliRunner
from ray.exceptions import ActorDiedError, RayTaskError

from prefvec_ray.cli.shared import Commands
from prefvec_ray.common.cluster import reason
from prefvec_ray.common.errors import InputError, JobError, from_traceback

BLIND = "node b does not see /x: is the storage mounted there?"


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        (f"prefvec_ray.common.errors.JobError: {BLIND}", BLIND),
        ("prefvec_ray.training.watch.RunStoppedError: loss is nan at step 3", "loss is nan at step 3"),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory", "OutOfMemoryError: CUDA out of memory"),
        ("KeyError: 'chosen'", "KeyError: 'chosen'"),
        ("a.b.c is not a module", "a.b.c is not a module"),
        ("AssertionError", "AssertionError"),
    ],
)
def test_the_last_line_of_a_traceback_is_reported_without_its_module(line, reported):
    assert from_traceback(line) == reported


@pytest.mark.parametrize(("error", "line", "code"), [(JobError, "failed", 1), (InputError, "error", 2)])
def test_a_command_whose_task_failed_elsewhere_prints_the_message_alone(error, line, code):
    @click.command(cls=Commands, invoke_without_command=True)
    def command() -> None:
        raise RayTaskError("task", "Traceback ...", error(BLIND)).as_instanceof_cause()

    done = CliRunner().invoke(command)
    assert (done.exit_code, done.stderr) == (code, f"{line}: {BLIND}\n")


def test_the_reason_of_a_failed_task_or_actor_is_the_message_alone():
    assert reason(RayTaskError("task", "Traceback ...", JobError(BLIND))) == BLIND
    assert reason(RayTaskError("task", "Traceback ...", KeyError("a"))) == "KeyError: 'a'"
    traceback = f"Traceback (most recent call last):\n  ...\nprefvec_ray.common.errors.JobError: {BLIND}"
    assert reason(ActorDiedError(RayTaskError("__init__", traceback, JobError(BLIND), actor_id="a"))) == BLIND

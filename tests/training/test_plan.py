"""What identifies a run, and which failures are worth another start."""

import subprocess
import sys

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from prefvec_ray.artifacts.training import ReferencePairs
from prefvec_ray.common.errors import JobError
from prefvec_ray.training import Resources, Watch
from prefvec_ray.training.failures import failure_reason, lost_ranks, worker_died
from prefvec_ray.training.train import plan_runs

STOPPED = "Traceback (most recent call last):\n  ...\nprefvec_ray.training.watch.RunStoppedError: loss is nan at step 3"
CLOSED = "Traceback:\n  ...\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321"
BUG = "Traceback:\n  ...\nKeyError: 'chosen'"


@pytest.mark.parametrize(
    ("failures", "lost", "reason"),
    [
        ([ActorDiedError()], True, "a process was lost: The actor died unexpectedly before finishing this task."),
        (
            [OutOfMemoryError("Task was killed due to the node running low on memory.\nadvice")],
            True,
            "a process was lost",
        ),
        ([RuntimeError(CLOSED), ActorDiedError()], True, ""),
        ([RuntimeError(CLOSED)], True, ""),
        ([RuntimeError(CLOSED), RuntimeError(STOPPED)], False, "loss is nan at step 3"),
        ([RuntimeError(BUG)], False, "KeyError: 'chosen'"),
        ([KeyError("chosen")], False, "KeyError: 'chosen'"),
        ([OSError("no such file\nadvice")], False, "OSError: no such file"),
        ([RuntimeError(CLOSED), JobError("node b does not see /x")], False, "node b does not see /x"),
        ([JobError("helpful+: Broken pipe")], False, "helpful+: Broken pipe"),
    ],
)
def test_a_lost_process_is_worth_another_start_and_an_error_of_the_run_is_not(failures, lost, reason):
    failures = [
        WorkerHealthCheckFailedError("A worker health check failed.", failure=failure)
        if isinstance(failure, ActorDiedError | OutOfMemoryError)
        else failure
        for failure in failures
    ]
    error = WorkerGroupError("", dict(enumerate(failures)))
    assert worker_died(error) is lost
    assert failure_reason(error).startswith(reason)
    gone = [rank for rank, failure in enumerate(failures) if isinstance(failure, WorkerHealthCheckFailedError)]
    assert lost_ranks(error) == gone


@pytest.mark.parametrize(
    ("failure", "again", "reason"),
    [
        (TimeoutError("the call took 10 s\nadvice"), True, "TimeoutError: the call took 10 s"),
        (ActorDiedError(), True, "a process was lost"),
        (JobError("node b does not see /x"), False, "node b does not see /x"),
    ],
)
def test_a_failure_of_ray_trains_controller_is_named_by_its_cause(failure, again, reason):
    error = ControllerError(failure)
    assert worker_died(error) is again
    assert failure_reason(error).startswith(reason)


def test_a_run_is_known_by_what_it_computes_and_not_by_how_it_is_watched(config):
    def keys(root="/a", data="1", **changes):
        references = {
            name: ReferencePairs(train=f"{root}/{name}-{data}/train", test=f"{root}/{name}-{data}/test", digest=name)
            for name in config.preferences
        }
        return [spec.key for spec in plan_runs(config.model_copy(update=changes), references)]

    plan = keys()
    assert keys(root="/b") == plan, "a job's folder may be moved, and mounted elsewhere"
    assert not set(keys(data="2")) & set(plan)
    assert len(set(plan)) == 4
    watched = {"watch": Watch(evaluations=2), "checkpoint_every": None, "retries": 0}
    assert keys(**watched, resources=Resources(workers=1, cpus_per_worker=2)) == plan
    assert not set(keys(dpo={**config.dpo, "beta": 0.2})) & set(plan)
    assert set(keys(seeds=[0, 1])) > set(plan)
    assert set(keys(mixed=True)) > set(plan)
    assert keys(polarity="positive") == [key for key in plan if "-positive-" in key]


def test_the_controller_of_a_run_imports_no_training_library():
    """It is one process a run, and imports the module of the function that its workers run."""
    code = "import sys; import prefvec_ray.training.workers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "prefvec_ray.training.workers" in imported
    assert not {"torch", "transformers", "trl"} & set(imported)

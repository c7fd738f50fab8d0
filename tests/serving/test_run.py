"""What is reported of an endpoint that did not start."""

import pytest

from prefvec_ray.serving.instance import RunningApp
from prefvec_ray.serving.run import _why

FAILED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
Traceback (most recent call last):
  File "replica.py", line 1, in __init__
{error}
"""


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (
            "prefvec_ray.common.errors.JobError: node b does not see /x: is the storage mounted there?",
            "node b does not see /x: is the storage mounted there?",
        ),
        ("prefvec_ray.common.errors.InputError: base /x: not a model", "base /x: not a model"),
        ("torch.AcceleratorError: CUDA error: no device", "AcceleratorError: CUDA error: no device"),
    ],
)
def test_the_reason_is_the_message_alone(error, reported):
    app = RunningApp("bob", "/", "DEPLOY_FAILED", "", None, None, {"replica": FAILED.format(error=error)})
    assert _why(app) == reported


def test_an_endpoint_that_somebody_deleted():
    assert _why(None) == "somebody deleted it meanwhile"

"""What other terminals read of a training job: its runs' states, and whether it is still there."""

import time
from pathlib import Path
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.training.checkpoints import checkpoint_folder
from prefvec_ray.training.status import SILENT, JobStatus, cancel, read_status

ROW = {"step": 3, "total": 9}


def job(**given: Any) -> JobStatus:
    return JobStatus.model_validate({"at": time.time(), "host": "here", "pid": 7} | given)


@pytest.fixture
def run(spec_of, tmp_path):
    return spec_of(train=[], test={"helpful": ""}, out=str(tmp_path / "dpo" / "run"))


def test_the_state_of_a_run(run):
    label = run.label
    assert job().state(run, 1) == "queued"
    assert job(rows={label: ROW}).state(run, 1) == "running"
    assert job(rows={label: ROW | {"failed": "why"}}).state(run, 1) == "failed"
    for over in (job(ended="cancelled", rows={label: ROW}), job(at=time.time() - SILENT - 1)):
        assert over.state(run, 1) == "stopped, begins anew"
    whole = checkpoint_folder(run.out) / "checkpoint-6"
    whole.mkdir(parents=True)
    (whole / "complete.json").write_text('{"workers": 1, "step": 6, "files": {}}')
    assert job(ended="cancelled").state(run, 1) == "stopped, continues from step 6"
    Path(run.out).mkdir(parents=True)
    (Path(run.out) / "run.json").write_text("{}")
    assert job().state(run, 1) == "finished"


def test_only_a_running_job_can_be_cancelled(tmp_path):
    with pytest.raises(InputError, match="no training has begun there"):
        cancel(tmp_path)
    for status, says in [
        (job(ended="finished"), "it ended: finished"),
        (job(at=time.time() - SILENT - 1), "process 7 on here is gone"),
    ]:
        (tmp_path / "status.json").write_text(status.model_dump_json())
        with pytest.raises(InputError, match=says):
            cancel(tmp_path)
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(InputError, match=r"status\.json: not JSON"):
        read_status(tmp_path)
    assert not (tmp_path / "cancel").exists()

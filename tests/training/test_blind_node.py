"""Training on a node that does not see the shared folder."""

import json
import os
import re
import subprocess
import sys

import pytest

from prefvec_ray.artifacts.training import Method
from prefvec_ray.training.references import ReferenceJob, ScoringTask
from prefvec_ray.training.sft import SftJob

DRIVER = """
import json, sys
from pathlib import Path
from prefvec_ray.common.cluster import connect
from prefvec_ray.training import Resources, worker_groups
from prefvec_ray.training.failures import RunsFailedError
from prefvec_ray.training.worker_groups import start_run
from prefvec_ray.training.references import _reference_worker
from prefvec_ray.training.sft import _sft_worker
from prefvec_ray.training.workers import dpo_worker

storage, given = Path(sys.argv[1]), json.loads(sys.argv[2])
retried = []
judge = worker_groups.worker_died
worker_groups.worker_died = lambda error: judge(error) and not retried.append(str(error))
workers = {"dpo": dpo_worker, "sft": _sft_worker, "reference": _reference_worker}
connect()
runs = [start_run(workers[name], job, name, Resources(), storage) for name, job in given.items()]
errors = [run.exception() for run in runs]
assert all(isinstance(error, RunsFailedError) for error in errors), errors
print(json.dumps({"errors": [str(error) for error in errors], "retried": retried}))
"""


@pytest.mark.slow
def test_training_on_a_node_without_the_folder_ends_in_one_line(
    scored, world_folder, new_cluster, blind_node, tmp_path
):
    base, spec = str(world_folder / "base"), scored["spec"].model_copy(update={"out": str(tmp_path / "run")})
    task = ScoringTask(target=str(tmp_path / "scored"), source=spec.train[0], pairs=1)
    reference = ReferenceJob(base=base, dpo={}, method=Method(), tasks=[task])
    sft = SftJob(
        base=base,
        base_fingerprint="",
        data_digest="",
        recipe={},
        method=Method(),
        data=base,
        checkpoint_every=None,
        out=str(tmp_path / "sft"),
    )
    jobs = {
        "dpo": {"spec": spec.model_dump(), "board": None},
        "sft": {"job": sft.model_dump(), "board": None},
        "reference": {"job": reference.model_dump(), "board": None},
    }
    with new_cluster(num_cpus=0, include_dashboard=False) as cluster, blind_node(cluster, world_folder):
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path / "ray"), json.dumps(jobs)],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not any("does not see" in error for error in told["retried"]), "another attempt would only repeat it"
    assert len(told["errors"]) == 3
    for error in told["errors"]:
        assert re.fullmatch(rf"node blind.* does not see {base}: is the storage mounted there\?", error), told

"""What all tests share: one Ray cluster and an offline, quiet environment for every process it starts."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

# Before torch, transformers or ray are imported by any test: their processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One cluster of 4 logical CPUs for the whole suite, in namespace `prefvec`; the value is its dashboard's URL."""
    import ray

    context = ray.init(num_cpus=4, namespace="prefvec", include_dashboard=True, log_to_driver=False)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The micro demo as its user runs it, in a process of its own: killed in the middle with SIGKILL, run again, and
    run a third time when it was finished.

    {"cwd", "folder", "killed", "resumed", "again"}: the folders, and what the three runs printed.
    """
    cwd = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "prefvec_ray.cli", "demo", "--world", "micro"]
    folder = cwd / "runs" / "demo-micro"
    environment = {**os.environ, "COLUMNS": "150"}

    def run() -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with (cwd / "killed.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output)
        until = time.monotonic() + 600
        while not (folder / "dpo").is_dir() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        process.kill()
        process.wait()
    killed = (cwd / "killed.txt").read_text()
    assert (folder / "dpo").is_dir(), killed
    return {"cwd": cwd, "folder": folder, "killed": killed, "resumed": run(), "again": run()}

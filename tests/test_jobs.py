"""The same stages as scripts for `ray job submit`, submitted to a real cluster."""

import os
import shutil
import sys
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from prefvec_ray.registry import Registry

ROOT = Path(__file__).parents[1]


def submit(url: str, entrypoint: str, working_dir: Path) -> tuple[JobStatus, str]:
    client = JobSubmissionClient(url)
    environment = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "PATH") if name in os.environ}
    agent_until, until = time.monotonic() + 60, time.monotonic() + 600
    runtime_env = {"working_dir": str(working_dir), "env_vars": environment}
    while True:
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            break
        except RuntimeError as error:  # No agent yet; or never, where another cluster of this machine has its port.
            if "try again later" not in str(error) or time.monotonic() > agent_until:
                raise
            time.sleep(1)
    while not client.get_job_status(job).is_terminal() and time.monotonic() < until:
        time.sleep(0.5)
    return client.get_job_status(job), client.get_job_logs(job)


def test_train_vectors_as_a_ray_job(ray_cluster, demo_run, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(ROOT / "jobs", project / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    config = project / "jobs" / "configs" / "job.yaml"
    pairs = demo_run["folder"] / "world" / "preferences.jsonl"
    config.write_text(
        f"name: job\noutput: {tmp_path}\nbase: {demo_run['folder'] / 'base'}\n"
        f"preferences: {{helpful: {{data: {pairs}, rows: 64}}}}\n"
        "dpo: {learning_rate: 1.0e-4, per_device_train_batch_size: 16, num_train_epochs: 1}\n"
    )
    status, logs = submit(
        ray_cluster, f"{sys.executable} jobs/train_vectors.py --config jobs/configs/job.yaml", project
    )
    assert status == JobStatus.SUCCEEDED, logs
    assert "DPO runs: " in logs  # progress reached the job's log
    assert [version.ref for version in Registry.open(tmp_path / "job" / "registry").list_vectors()] == ["helpful@1"]

    config.write_text(config.read_text().replace("learning_rate", "learning_rat"))
    status, logs = submit(
        ray_cluster, f"{sys.executable} jobs/train_vectors.py --config jobs/configs/job.yaml", project
    )
    assert status == JobStatus.FAILED
    assert "did you mean 'learning_rate'?" in logs

"""What is lost when something breaks in the middle: as little as can be, and nothing half-done is ever published."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prefvec_ray.artifacts.training import Method, RunResult, RunSpec
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.training.checkpoints import (
    DiskFullError,
    check_space,
    checkpoint_folder,
    newest_checkpoint,
)
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.zero import deepspeed_config
from prefvec_ray.vectors import load_vector

EPOCHS_OF_THREE_STEPS = {"per_device_train_batch_size": 48, "num_train_epochs": 2}


class PulledPlugError(Exception):
    pass


def interrupted(spec: RunSpec, step: int, work_dir: Path) -> None:
    """Train until `step` and no further."""

    def report(values):
        if values["step"] >= step:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        run_dpo(spec, report, work_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "recipe"),
    [
        (None, {}),
        ("zero3", {}),
        # step 4 is the first of the second epoch
        (None, {"train_sampling_strategy": "group_by_length", "padding_free": True, **EPOCHS_OF_THREE_STEPS}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(scored, tmp_path, deepspeed, recipe):
    changes = {
        "out": str(tmp_path / "whole"),
        "checkpoint_every": 2,
        "method": Method(deepspeed=deepspeed_config(deepspeed)),
        "dpo": scored["spec"].dpo | recipe,
    }
    whole = scored["spec"].model_copy(update=changes)
    broken = whole.model_copy(update={"out": str(tmp_path / "broken")})
    expected = run_dpo(whole, lambda values: None, tmp_path / "work")
    assert not checkpoint_folder(whole.out).exists()  # none outlives its run

    interrupted(broken, 5, tmp_path / "work")
    assert not Path(broken.out).exists()
    kept = [path.name for path in checkpoint_folder(broken.out).glob("checkpoint-*")]
    assert kept == ["checkpoint-4"]
    result = run_dpo(broken, lambda values: None, tmp_path / "work")

    assert expected is not None
    assert result is not None
    assert (expected.resumed_at, result.resumed_at) == (None, 4)
    assert [point.loss for point in result.history] == [point.loss for point in expected.history]
    assert result.held_out == expected.held_out
    a, b = (load_vector(f"{spec.out}/delta") for spec in (whole, broken))
    assert a.names() == b.names()
    assert all(torch.equal(a.dense(name), b.dense(name)) for name in a.names())  # bit by bit, on CPU


def test_a_torn_checkpoint_is_not_resumed(scored, tmp_path):
    spec = scored["spec"].model_copy(update={"out": str(tmp_path / "run"), "checkpoint_every": 1})
    interrupted(spec, 3, tmp_path / "work")
    folder = checkpoint_folder(spec.out)
    assert newest_checkpoint(folder, workers=1) == (folder / "checkpoint-2", 2)
    assert newest_checkpoint(folder, workers=2) is None  # its steps would see other pairs
    unmarked = folder / "checkpoint-9"
    shutil.copytree(folder / "checkpoint-2", unmarked, ignore=shutil.ignore_patterns("complete.json"))
    assert newest_checkpoint(folder, workers=1) == (folder / "checkpoint-2", 2)
    with (folder / "checkpoint-2" / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    assert newest_checkpoint(folder, workers=1) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB: room for one checkpoint of the micro base, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_half_written_is_kept(scored, small_disk, tmp_path):
    spec = scored["spec"].model_copy(update={"out": str(small_disk / "run"), "checkpoint_every": 1})
    with pytest.raises(DiskFullError, match=rf"no space left in {small_disk}: .* free; a run takes up to \d+\.\d MB: "):
        run_dpo(spec, lambda values: None, tmp_path / "work")
    assert not Path(spec.out).exists()
    assert not list(small_disk.glob(".run.partial*"))
    found = newest_checkpoint(checkpoint_folder(spec.out), workers=1)
    assert found is not None
    checkpoint, step = found
    assert list(checkpoint_folder(spec.out).glob("checkpoint-*")) == [checkpoint]  # the torn one is gone

    # Space was made: the run goes on from the checkpoint that was whole.
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    result = run_dpo(spec, lambda values: None, tmp_path / "work")
    assert result is not None
    assert result.resumed_at == step
    assert json.loads((small_disk / "run" / "run.json").read_text())["steps"] == 8


def test_a_job_that_would_fill_the_disk_is_refused(world_folder, small_disk):
    base = world_folder / "base"
    with pytest.raises(
        InputError, match=r"small has 6\.\d MB free; 4 runs of [\d,]+ parameters leave .* choose another"
    ):
        check_space(small_disk, base, runs=4, at_once=4, vectors=2, checkpoints=True)
    check_space(small_disk, base, runs=1, at_once=1, vectors=0, checkpoints=False)


def steps_kept(folder: Path) -> dict[str, int]:
    """The step of each run's newest whole checkpoint, by the run's key."""
    newest: dict[str, int] = {}
    for marker in folder.glob("dpo/.*.checkpoints/checkpoint-*/complete.json"):
        run = marker.parents[1].name.removeprefix(".").removesuffix(".checkpoints")
        newest[run] = max(newest.get(run, 0), int(marker.parent.name.removeprefix("checkpoint-")))
    return newest


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_driver_and_a_lost_node_cost_no_finished_work(world_folder, new_cluster, tmp_path):
    """`prefvec train` on two nodes, one run on each. Its driver is killed; started again, it goes on from the
    checkpoints; then a node is lost, and the run that was on it goes on where there is room."""
    config = tmp_path / "job.yaml"
    config.write_text(
        f"name: job\noutput: {tmp_path}\nbase: {world_folder / 'base'}\n"
        f"preferences: {{helpful: {{data: {world_folder / 'preferences.jsonl'}, rows: 64}}}}\n"
        "dpo: {learning_rate: 1.0e-4, per_device_train_batch_size: 16, num_train_epochs: 120}\n"
        "checkpoint_every: 20\n"
    )
    folder, log = tmp_path / "job", tmp_path / "log.txt"
    with new_cluster(num_cpus=1, include_dashboard=False) as cluster:
        other = cluster.add_node(num_cpus=1)
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "COLUMNS": "160"}
        command = [sys.executable, "-m", "prefvec_ray.cli", "train", "--config", str(config)]

        def start() -> subprocess.Popen[bytes]:
            with log.open("w") as output:
                return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

        driver = start()
        wait_for(lambda: len(steps_kept(folder)) == 2, driver, log)
        driver.kill()
        driver.wait()
        assert not list(folder.glob("dpo/*/run.json"))
        kept: dict[str, int] = {}
        while kept != (kept := steps_kept(folder)):  # its workers end a moment after it
            time.sleep(3)

        driver = start()
        wait_for(lambda: all(steps_kept(folder)[run] > kept[run] for run in kept), driver, log)
        cluster.remove_node(other, allow_graceful=False)
        assert driver.wait(timeout=240) == 0, log.read_text()

    lost = r"(helpful[+-] seed 0): a worker was lost \(node ([\d.]+)\); it continues from step (\d+)"
    ((label, node, step),) = re.findall(f"^{lost}$", log.read_text(), re.MULTILINE)
    assert node == other.node_ip_address
    runs = [RunResult.model_validate(run) for run in json.loads((folder / "training.json").read_text())["runs"]]
    assert [run.steps for run in runs] == [480, 480]
    for run in runs:
        if run.spec.label == label:  # it lost its node as well
            assert run.resumed_at == int(step) > kept[run.spec.key]
        else:  # it only lost its driver
            assert run.resumed_at == kept[run.spec.key]
    assert [version.ref for version in Registry.open(folder / "registry").list_vectors()] == ["helpful@1"]
    passes = [
        json.loads(line)["set"] for line in next(folder.glob("reference/*/passes.jsonl")).read_text().splitlines()
    ]
    assert passes == ["train", "test", "answers-16x64"]  # once, for both polarities and both drivers

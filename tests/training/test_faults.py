"""What is lost when something breaks in the middle: as little as can be, and nothing half-done is ever published."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefvec_ray.errors import InputError
from prefvec_ray.training.checkpoints import (
    DiskFullError,
    check_space,
    checkpoint_folder,
    newest_checkpoint,
    partial_folder,
)
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.vectors import load_vector


class PulledPlugError(Exception):
    pass


def interrupted(spec, step: int, work_dir: Path) -> None:
    """Train until `step` and no further."""

    def report(values):
        if values["step"] >= step:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        run_dpo(spec, report, work_dir)


def test_a_resumed_run_equals_an_uninterrupted_one(scored, tmp_path):
    whole = scored["spec"].model_copy(update={"out": str(tmp_path / "whole"), "checkpoint_every": 2})
    broken = whole.model_copy(update={"out": str(tmp_path / "broken")})
    expected = run_dpo(whole, lambda values: None, tmp_path / "work")
    assert not checkpoint_folder(whole.out).exists()  # none outlives its run

    interrupted(broken, 5, tmp_path / "work")
    assert not Path(broken.out).exists()
    kept = [path.name for path in checkpoint_folder(broken.out).glob("checkpoint-*")]
    assert kept == ["checkpoint-4"]
    result = run_dpo(broken, lambda values: None, tmp_path / "work")

    assert (expected["resumed_at"], result["resumed_at"]) == (None, 4)
    assert [entry["loss"] for entry in result["history"]] == [entry["loss"] for entry in expected["history"]]
    assert result["held_out"] == expected["held_out"]
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
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 6 MB: room for one checkpoint of the micro base, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_named_and_nothing_half_written_is_kept(scored, small_disk, tmp_path):
    spec = scored["spec"].model_copy(update={"out": str(small_disk / "run"), "checkpoint_every": 1})
    with pytest.raises(DiskFullError, match=rf"no space left in {small_disk}: .* free; a run takes up to \d+\.\d MB: "):
        run_dpo(spec, lambda values: None, tmp_path / "work")
    assert not Path(spec.out).exists()
    assert not partial_folder(spec.out).exists()
    checkpoint, step = newest_checkpoint(checkpoint_folder(spec.out), workers=1)
    assert list(checkpoint_folder(spec.out).glob("checkpoint-*")) == [checkpoint]  # the torn one is gone

    # Space was made: the run goes on from the checkpoint that was whole.
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run_dpo(spec, lambda values: None, tmp_path / "work")["resumed_at"] == step
    assert json.loads((small_disk / "run" / "run.json").read_text())["steps"] == 8


def test_a_job_that_would_fill_the_disk_is_refused(world_folder, small_disk):
    base = world_folder / "base"
    with pytest.raises(
        InputError, match=r"small has 6\.\d MB free; 4 runs of [\d,]+ parameters leave .* choose another"
    ):
        check_space(small_disk, base, runs=4, at_once=4, vectors=2, checkpoints=True)
    check_space(small_disk, base, runs=1, at_once=1, vectors=0, checkpoints=False)

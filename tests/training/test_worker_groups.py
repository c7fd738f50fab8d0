"""Worker groups that take turns: what a task leaves to the next one, and what happens to both when one is lost."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from prefvec_ray.training import Resources, RunsFailedError
from prefvec_ray.training import worker_groups as module
from prefvec_ray.training.worker_groups import WorkerGroups, worker_groups

ONE = Resources()


def note(config: dict[str, Any]) -> None:
    """A task: leaves its process's number, and does what `config` says."""
    with Path(config["out"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    if reason := config.get("raises"):
        raise ValueError(reason)
    if (flag := config.get("dies_once")) and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    until = time.monotonic() + 60
    while (flag := config.get("waits_for")) and not Path(flag).exists() and time.monotonic() < until:
        time.sleep(0.05)


@pytest.fixture
def groups(ray_cluster: str, tmp_path: Path) -> Iterator[WorkerGroups]:
    with worker_groups(tmp_path / "job", tmp_path / "ray", retries=1) as groups:
        yield groups


def processes(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()]


def test_short_tasks_take_turns_in_one_process_and_a_loss_repeats_only_the_one_it_met(groups, tmp_path, monkeypatch):
    def run(name: str, *, resources: Resources = ONE, alone: bool = False, **given: Any) -> list[int]:
        given = {"out": str(tmp_path / name), **given}
        groups.start(note, given, "run", resources, alone=alone).result(timeout=120)
        return processes(tmp_path / name)

    first = run("first")
    assert run("second") == first
    before, after = run("third", dies_once=str(tmp_path / "died"))
    assert before == first[0] != after
    assert run("fourth") == [after], "what was started again is kept as well"
    assert processes(tmp_path / "first") == first, "what is done is not done again"

    with pytest.raises(RunsFailedError, match=r"^ValueError: too bad$"):
        run("fifth", raises="too bad")
    used = {*first, after, *run("tracked", alone=True)}
    assert len(used) == 3, "an error ends the processes that it met"
    assert not used & set(run("sixth", resources=Resources(cpus_per_worker=3))), "the tracked one was alone"
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    run("seventh", resources=Resources(workers=2))  # has room only because the idle group of three CPUs gave it back
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < until:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4, "it worked for longer than groups are kept"


def test_without_its_board_a_task_ends_and_the_next_one_runs(groups, tmp_path):
    flag, out = tmp_path / "flag", tmp_path / "out"
    running = groups.start(note, {"out": str(out), "waits_for": str(flag)}, "running", ONE)
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until:
        time.sleep(0.1)
    ray.kill(groups.board)
    time.sleep(1)
    assert not running.done()
    flag.touch()
    running.result(timeout=120)
    groups.start(note, {"out": str(out)}, "next", ONE).result(timeout=120)
    assert len(set(processes(out))) == 2

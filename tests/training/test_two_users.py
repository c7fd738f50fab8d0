"""Two users train on one cluster at once, each with a registry; what happens to one is nothing to the other."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import ray
import torch
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from prefvec_ray.cli import main
from prefvec_ray.cli.train import run_train
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import RegistryClient, open_registry, start_registry, stop_registry
from prefvec_ray.registry.running import running_registries
from prefvec_ray.training import TrainingConfig
from prefvec_ray.vectors import save_vector, vector_from_state


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.2)


def user(config: TrainingConfig, name: str) -> TrainingConfig:
    """The same job of another user: one preference, half the pairs."""
    pairs = config.preferences["helpful"].model_copy(update={"rows": 32})
    return config.model_copy(update={"name": name, "preferences": {"helpful": pairs}})


def train(config: TrainingConfig, folder: Path) -> "subprocess.Popen[str]":
    """`prefvec train` on the tests' cluster."""
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "COLUMNS": "200"}
    command, pipe = [sys.executable, "-m", "prefvec_ray.cli", "train", "--config", str(file)], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_trainings_and_two_registries_on_one_cluster(ray_cluster, config, tmp_path):
    first, second = user(config, "first"), user(config, "second")
    processes = [train(first, tmp_path), train(second, tmp_path)]
    asked = CliRunner()

    def ask(command: str, of: TrainingConfig) -> Result:
        return asked.invoke(main, ["train", command, "--config", str(tmp_path / f"{of.name}.yaml")])

    try:
        wait_for(lambda: (first.folder / "dpo").is_dir())
        assert f"training, process {processes[0].pid} on" in ask("status", first).output
        assert ask("cancel", first).exit_code == 0
        assert "cancelled from another terminal" in processes[0].communicate(timeout=60)[0]
        assert processes[0].returncode == 1
        assert "ended: cancelled" in ask("status", first).output
        assert "no training is running there; it ended: cancelled" in ask("cancel", first).output
        printed = processes[1].communicate(timeout=300)[0]
        assert ask("status", second).output.count("finished") == 3  # two runs, and the job
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1].returncode == 0, printed
    names = {root: name for name, root in running_registries().items()}
    theirs = names[second.store]
    assert f"--registry ray:{theirs}" in printed
    assert printed.index("accuracy") < printed.index("helpful@1"), "the results come before they are published"
    assert [version.ref for version in open_registry(f"ray:{theirs}").list_vectors()] == ["helpful@1"]

    # The first goes on from where it was cancelled; what cannot be published is an error after its results are shown.
    other = vector_from_state({"w": torch.ones(2)}, preference="Helpful", base_fingerprint="blake3:" + "b" * 64)
    start_registry(first.store).publish_vector(save_vector(other, tmp_path / "Helpful"))
    again = train(first, tmp_path)
    printed = again.communicate(timeout=300)[0]
    assert again.returncode == 2, printed
    assert printed.index("accuracy") < printed.index("error: name helpful: there is already 'Helpful'")

    stop_registry(first.store)
    assert theirs in running_registries()
    client = open_registry(f"ray:{theirs}")
    assert isinstance(client, RegistryClient)
    assert client.health()["vectors"] == 1
    stop_registry(second.store)


def test_a_registry_that_another_writes_to_is_found_before_anything_is_trained(ray_cluster, config):
    other = start_registry(config.store, name="another-teams")
    with pytest.raises(InputError, match=r"is being written to by actor another-teams .*--registry ray:another-teams"):
        run_train(config, Console(file=StringIO()))
    other.stop()
    assert not (config.folder / "dpo").exists()
    assert not (config.folder / "reference").exists()

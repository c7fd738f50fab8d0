"""The commands of a registry, on a path that holds none and through names that nobody has."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prefvec_ray.cli import main
from prefvec_ray.registry import Registry

READING = {
    "list": ["vectors", "list"],
    "show": ["vectors", "show", "helpful"],
    "split": ["vectors", "split", "helpful", "--by", "module"],
    "presets": ["registry", "presets"],
    "lineage": ["registry", "lineage", "helpful"],
    "verify": ["registry", "verify"],
    "gc": ["registry", "gc", "--apply"],
    "doctor": ["registry", "doctor"],
    "alias": ["registry", "alias", "helpful", "production", "1", "--reason", "good"],
    "retire": ["registry", "retire", "helpful@1", "--reason", "old"],
    "bundle": ["registry", "export", "helpful@1", "--out", "bundle"],
    "export": ["export", "--base", "base", "--set", "helpful@1=1", "--out", "merged"],
}


def prefvec(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("words", READING.values(), ids=list(READING))
def test_a_command_that_reads_or_maintains_creates_no_registry(words: list[str], tmp_path: Path) -> None:
    told = prefvec(*words, "--registry", str(tmp_path / "typo"))
    assert told.exit_code == 2
    assert told.output.splitlines() == [
        f"error: {tmp_path}/typo: no registry here (no registry.json); check the path and that the storage is mounted,"
        " or publish a vector first"
    ]
    assert list(tmp_path.iterdir()) == []


def test_importing_creates_one(tmp_path: Path, make_vector: Callable[..., Path]) -> None:
    there = Registry.open(tmp_path / "there")
    there.publish_vector(make_vector())
    bundle = there.export_bundle(tmp_path / "bundle", ["helpful@1"])
    here = ["--registry", str(tmp_path / "here")]
    assert prefvec("registry", "import", *here, str(bundle)).output == "helpful@1 -> helpful@1\n"
    assert prefvec("vectors", "show", "helpful", *here).exit_code == 0


def test_names_on_the_cluster(ray_cluster: str, tmp_path: Path, make_vector: Callable[..., Path]) -> None:
    """`ray:` names an actor in every command; an unknown name is answered with those that run."""
    from prefvec_ray.registry import start_registry

    client = start_registry(tmp_path / "store")
    client.publish_vector(make_vector())
    on = ["--registry", f"ray:{client.name}"]
    assert "helpful@1" in prefvec("vectors", "list", *on).output
    moved = prefvec("registry", "alias", *on, "helpful", "production", "1", "--reason", "good")
    assert moved.output == "helpful@production -> 1\n"
    assert client.resolve("helpful@production").version == 1
    assert prefvec("registry", "verify", *on).output.splitlines()[-1] == "sound"

    unknown = prefvec("vectors", "list", "--registry", "ray:prefvec-registry")
    assert unknown.exit_code == 2
    assert f"no registry actor 'prefvec-registry': running are ray:{client.name} ({tmp_path}/store)" in unknown.output
    while_it_writes = prefvec("registry", "retire", "helpful@1", "--reason", "x", "--registry", str(tmp_path / "store"))
    assert f"use --registry ray:{client.name}" in while_it_writes.output

    stopped = prefvec("registry", "stop", "--registry", str(tmp_path / "store"))
    assert stopped.output == f"stopped ray:{client.name}; the store keeps everything\n"
    again = prefvec("registry", "stop", *on)
    assert (again.exit_code, "no actor to stop" in again.output) == (2, True)
    assert prefvec("vectors", "show", "helpful@production", "--registry", str(tmp_path / "store")).exit_code == 0

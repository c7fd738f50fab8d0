"""Full disks, damaged and lost records, and a `retire` at the wrong moment: nothing disappears in silence."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.registry.records import VectorVersion, encode
from prefvec_ray.registry.store import Store
from prefvec_ray.serving.release.release import newest_vectors

Make = Callable[..., Path]
Open = Callable[..., Registry]
BASE = "blake3:" + "b" * 64
PRODUCTION = "refs/vectors/helpful/production"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_gc_makes_room_on_a_full_disk(small_disk: Path, open_registry: Open, make_vector: Make) -> None:
    """To the last byte: not even the lease's own file can be written. `gc` is what the error advises."""
    root = small_disk / "store"
    registry = open_registry(root)
    registry.publish_vector(make_vector(seed=1, size=64))
    orphan, _ = registry.store.stage(make_vector(seed=2, size=64) / "vector.safetensors")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(StoreError, match=r"no space left; make room \(`gc`\)"):
        registry.set_alias("helpful", "production", 1, "why")

    done = CliRunner().invoke(main, ["registry", "gc", "--registry", str(root), "--apply", "--grace", "0"])
    assert done.exit_code == 0, done.output
    assert "deleted 1 blobs" in done.output
    assert orphan not in registry.store.blobs()
    registry.set_alias("helpful", "production", 1, "why")
    assert registry.publish_vector(make_vector("helpful", seed=1, size=8)).version == 2
    assert registry.verify().sound


def damage(store: Store, key: str) -> bytes:
    """Flip a bit of a record; returns what it was."""
    good = store.read_fresh(key)
    assert good
    store.overwrite(key, good[:40] + bytes([good[40] ^ 1]) + good[41:])
    return good


def test_a_damaged_newest_manifest_is_an_error(registry: Registry, make_vector: Make) -> None:
    """Serving's default is the newest version of every vector: a damaged one must not be left out of it."""
    registry.publish_vector(make_vector("helpful", 1))
    registry.publish_vector(make_vector("harmless", 2))
    assert newest_vectors(registry, BASE).keys() == {"helpful", "harmless"}
    good = damage(registry.store, "vectors/harmless/1.json")
    with pytest.raises(StoreError, match=r"vectors/harmless/1\.json: the record is damaged"):
        newest_vectors(registry, BASE)
    with pytest.raises(StoreError, match="damaged"):
        registry.list_vectors()
    assert [version.ref for version in registry.list_vectors(skip_damaged=True)] == ["helpful@1"]
    assert len(registry.damaged()) == 1
    registry.store.overwrite("vectors/harmless/1.json", good)
    assert newest_vectors(registry, BASE).keys() == {"helpful", "harmless"}


def test_a_damaged_preset_is_an_error(registry: Registry, make_vector: Make) -> None:
    registry.publish_vector(make_vector())
    registry.publish_preset("cautious", {"helpful@1": 0.5}, reason="knee")
    damage(registry.store, "presets/cautious/1.json")
    with pytest.raises(StoreError, match="damaged"):
        registry.list_presets()
    assert registry.list_presets(skip_damaged=True) == []


def test_lists_say_that_they_are_not_complete(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    registry = open_registry(tmp_path / "store")
    registry.publish_vector(make_vector("helpful", 1))
    registry.publish_vector(make_vector("harmless", 2))
    damage(registry.store, "vectors/harmless/1.json")
    for more in ([], ["--json"]):
        done = CliRunner().invoke(main, ["vectors", "list", "--registry", str(tmp_path / "store"), *more])
        assert done.exit_code == 1
        assert "helpful@1" in done.stdout or '"name": "helpful"' in done.stdout
        assert "the list is not complete: vectors/harmless/1.json: the record is damaged" in done.stderr


@pytest.mark.parametrize("what", ["preset", "hold", "served"])
def test_nothing_is_retired_between_looking_and_writing(
    root: str, open_registry: Open, make_vector: Make, what: str
) -> None:
    """While one writer retires a version, the other waits, and then sees that it is gone."""
    first, second = open_registry(root), open_registry(root, "other-cache")
    first.publish_vector(make_vector())
    started, failed = threading.Event(), []
    write = {
        "preset": lambda: second.publish_preset("cautious", {"helpful@1": 0.5}, reason="knee"),
        "hold": lambda: second.hold("replica-1", ["helpful@1"]),
        "served": lambda: second.record_served({"helpful@1": 0.1}, base_fingerprint=BASE),
    }[what]
    acquire = second.lease.acquire

    def acquired(wait_s: float = 30.0) -> None:
        started.set()  # whatever is looked up before the lease has been looked up by now
        acquire(wait_s)

    second.lease.acquire = acquired  # type: ignore[method-assign]

    def attempt() -> None:
        try:
            write()
        except InputError as error:
            failed.append(str(error))

    other = threading.Thread(target=attempt)
    with first.lease.held():
        other.start()
        assert started.wait(60)
        first.retire("helpful@1", "replaced")
    other.join(60)
    assert ["was retired (replaced)" in line for line in failed] == [True]
    assert first.list_presets() == []
    assert first.holds() == {}
    assert first.verify().sound


def moved(registry: Registry, make_vector: Make) -> None:
    """An alias that moved three times, and tags that changed twice."""
    with registry.lease.held():
        for seed in (1, 2):
            registry.publish_vector(make_vector(seed=seed))
        for version in (1, 2, 1):
            registry.set_alias("helpful", "production", version, f"to {version}")
        registry.set_tags("helpful@1", {"stage": "candidate"}, "new")
        registry.set_tags("helpful@1", {"stage": "shipped"}, "better")


@pytest.mark.parametrize("loss", ["lost", "damaged"])
def test_a_lost_step_of_an_alias_can_be_repaired(registry: Registry, make_vector: Make, loss: str) -> None:
    """An earlier step: the alias keeps its target, `verify` names the command, and the command works."""
    moved(registry, make_vector)
    if loss == "lost":
        registry.store.delete(f"{PRODUCTION}/2.json")
    else:
        damage(registry.store, f"{PRODUCTION}/2.json")
    assert registry.resolve("helpful@production").version == 1
    with pytest.raises(StoreError, match=r"production/2\.json"):
        registry.set_alias("helpful", "production", 2, "again")
    (finding,) = [finding for finding in registry.verify().findings if finding.path == f"{PRODUCTION}/2.json"]
    assert "prefvec registry repair --apply" in finding.detail
    assert registry.repair() == [f"{PRODUCTION}/2.json"]
    assert not registry.verify().sound  # nothing has been changed yet
    assert registry.repair(apply=True) == [f"{PRODUCTION}/2.json"]
    assert registry.repair(apply=True) == []
    assert [move.kind for move in registry.alias_history("helpful", "production")] == ["move", "lost-move", "move"]
    assert registry.set_alias("helpful", "production", 2, "again").sequence == 4
    assert registry.resolve("helpful@production").version == 2
    assert registry.verify().sound
    assert len(registry.store.children("damaged")) == (loss == "damaged")


def test_a_damaged_newest_step_is_not_guessed(registry: Registry, make_vector: Make) -> None:
    moved(registry, make_vector)
    for key in (f"{PRODUCTION}/3.json", "tags/vectors/helpful/1/2.json"):
        damage(registry.store, key)
    with pytest.raises(InputError, match="damaged: what it points at is not known"):
        registry.retire("helpful@2", "old")
    assert len(registry.repair(apply=True)) == 2
    with pytest.raises(StoreError, match="the newest step was lost; set it again"):
        registry.resolve("helpful@production")
    with pytest.raises(StoreError, match="set it again"):
        registry.tags("helpful@1")
    assert {"problem"} == {c.level for c in registry.doctor() if "set the alias or the tags again" in c.detail}
    registry.set_alias("helpful", "production", 2, "from the runbook")
    registry.set_tags("helpful@1", {}, "none")
    assert registry.resolve("helpful@production").version == 2
    assert registry.tags("helpful@1") == {}
    assert registry.verify().sound


def test_records_in_the_wrong_place_are_not_used(registry: Registry, make_vector: Make) -> None:
    moved(registry, make_vector)
    first, third = (registry.store.read_fresh(f"{PRODUCTION}/{number}.json") for number in (2, 3))
    assert first
    assert third
    registry.store.overwrite(f"{PRODUCTION}/3.json", first)
    with pytest.raises(StoreError, match=r"holds refs/vectors/helpful/production/2\.json"):
        registry.resolve("helpful@production")


def test_strays_do_not_break_a_list(registry: Registry, make_vector: Make) -> None:
    """What a file manager leaves behind, and numbers in other alphabets."""
    registry.publish_vector(make_vector())
    for key in ("vectors/.DS_Store", "vectors/helpful/\u0663.json", "vectors/helpful/02.json", "vectors/helpful/7"):
        registry.store.overwrite(key, b"x")
    assert registry.names() == ["helpful"]
    assert registry.versions("helpful") == [1]
    assert [version.ref for version in registry.list_vectors()] == ["helpful@1"]
    assert not registry.verify().sound


def test_a_record_that_is_no_plain_file_is_not_read(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    registry = open_registry(tmp_path / "store")
    registry.publish_vector(make_vector())
    manifest = tmp_path / "store" / "vectors" / "helpful" / "1.json"
    moved_to = manifest.rename(tmp_path / "elsewhere.json")
    manifest.symlink_to(moved_to)
    with pytest.raises(StoreError, match=r"vectors/helpful/1\.json"):
        registry.resolve("helpful")
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(StoreError, match="is no plain file"):
        registry.resolve("helpful")
    assert not registry.verify().sound
    manifest.unlink()
    with manifest.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match="of a record's size"):
        registry.resolve("helpful")


def test_a_hostile_manifest_does_not_break_what_is_printed(
    tmp_path: Path, open_registry: Open, make_vector: Make
) -> None:
    """A record that somebody wrote into the store by hand: the list goes on, and names it."""
    registry = open_registry(tmp_path / "store")
    version = registry.publish_vector(make_vector())
    changes: list[dict[str, object]] = [
        {"created": 1e308},
        {"form": "[/]"},
        {"form": "\x1b[2J"},
        {"metrics": {"held_out_accuracy_positive": 10**500}},
    ]
    for number, change in enumerate(changes, start=2):
        bad = VectorVersion.model_construct(**{**version.__dict__, "version": number, **change})
        registry.store.overwrite(f"vectors/helpful/{number}.json", encode(bad))
    for words in (
        ["vectors", "list"],
        ["registry", "verify"],
        ["registry", "doctor"],
        ["registry", "lineage", "helpful@1"],
    ):
        done = CliRunner().invoke(main, [*words, "--registry", str(tmp_path / "store")])
        assert done.exception is None or isinstance(done.exception, SystemExit), words
        assert all(char.isprintable() or char == "\n" for char in done.output)
    assert "helpful@1" in CliRunner().invoke(main, ["vectors", "list", "--registry", str(tmp_path / "store")]).output

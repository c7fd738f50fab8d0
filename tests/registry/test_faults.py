"""Processes that die, disks that fill up, publishers that race. Real processes, real file systems."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.registry.store import Store

Make = Callable[..., Path]
Open = Callable[..., Registry]
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.slow
def test_a_publisher_killed_at_every_step(tmp_path: Path, make_vector: Make) -> None:
    """Before the manifest is linked nothing is visible, after it everything; the same publication again finishes it."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kill_publisher.py", tmp_path / "store", make_vector()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] >= 8
    outcomes = result["outcomes"]
    assert all(outcome["status"] == -signal.SIGKILL for outcome in outcomes)
    assert all(outcome["sound"] and outcome["retried"] and outcome["clean"] for outcome in outcomes)
    visible = [outcome["visible"] for outcome in outcomes]
    assert visible == sorted(visible)  # once visible, it stays
    assert set(visible) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_publishers_killed_while_others_publish(tmp_path: Path, where: str) -> None:
    """kill -9 at random moments: what was acknowledged stays, and nothing half-written is ever part of the store."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kill_publishers.py", tmp_path, "6", where],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] == 6
    assert seen["acknowledged"] == seen["distinct"] > 0
    assert seen["lost"] == seen["harm"] == []
    assert seen["conditional"] == (where == "bucket")


def test_concurrent_publishers_without_an_actor(root: str, open_registry: Open, make_vector: Make) -> None:
    """Eight at once under one name: eight versions, each with its own bytes."""
    folders = [make_vector(seed=seed) for seed in range(8)]
    registries = [open_registry(root, f"cache-{index}") for index in range(8)]

    def publish(index: int) -> tuple[str, str]:
        version = registries[index].publish_vector(folders[index])
        return version.ref, version.digest

    with ThreadPoolExecutor(8) as pool:
        published = dict(pool.map(publish, range(8)))
    assert sorted(published) == [f"helpful@{number}" for number in range(1, 9)]
    reader = open_registry(root)
    assert {version.ref: version.digest for version in reader.list_vectors()} == published
    assert len(set(published.values())) == 8
    assert reader.verify().findings == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(small_disk: Path, open_registry: Open, make_vector: Make) -> None:
    registry = open_registry(small_disk / "store")
    published = registry.publish_vector(make_vector(seed=1, size=64))
    with pytest.raises(StoreError, match="make room"):  # known beforehand
        registry.publish_vector(make_vector(seed=2, size=512))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(StoreError, match=r"no space left|make room"):
        registry.publish_vector(make_vector(seed=3, size=64))
    with pytest.raises(StoreError, match="no space left"):
        registry.set_alias("helpful", "production", 1, "why")
    assert [version.ref for version in registry.list_vectors()] == ["helpful@1"]
    assert registry.verify().sound
    assert list((small_disk / "store" / "staging").iterdir()) == []
    filler.unlink()
    registry.set_alias("helpful", "production", 1, "why")
    assert registry.resolve("helpful@production") == published
    assert registry.publish_vector(make_vector(seed=3, size=64)).version == 2
    assert registry.verify().sound


LIMITED = """
import resource, sys
from prefvec_ray.registry.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
Store.open(sys.argv[1]).stage(sys.argv[2])
"""


def test_a_quota(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    """The file may not grow beyond a limit, which shows in the middle of the copy."""
    registry = open_registry(tmp_path / "store")
    registry.publish_vector(make_vector(seed=1))
    source = make_vector(seed=2, size=256) / "vector.safetensors"
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "store"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no space left; make room" in done.stderr
    assert registry.verify().findings == ()


def test_a_source_that_changes_while_it_is_copied(root: str, open_registry: Open, make_vector: Make) -> None:
    registry, folder = open_registry(root), make_vector(size=64)
    file = folder / "vector.safetensors"

    def step(name: str) -> None:
        if name == "hashed":
            last = file.read_bytes()[-1]
            with file.open("r+b") as writer:
                writer.seek(-1, os.SEEK_END)
                writer.write(bytes([last ^ 1]))

    registry.store.step = step
    with pytest.raises(StoreError, match="changed while"):
        registry.publish_vector(folder)
    assert registry.list_vectors() == []
    assert registry.store.blobs() == {}


def test_an_upload_that_fails_leaves_nothing(bucket_root: str) -> None:
    """pyarrow completes an upload even after an error; the store takes it back."""
    store = Store.open(bucket_root)
    from prefvec_ray.registry.blobs import hash_file

    whole = Path(__file__)

    def pieces() -> Iterator[bytes]:
        yield whole.read_bytes()[:100]
        raise ConnectionResetError("the cable")

    with pytest.raises(StoreError, match="the cable"):
        store.receive(hash_file(whole), whole.stat().st_size, pieces())
    assert store.blobs() == {}

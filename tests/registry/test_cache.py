"""The node's cache with real processes: one download however many ask, eviction that never hurts a reader."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefvec_ray.registry import FileEntry, Registry, StoreError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.vectors import load_vector

Make = Callable[..., Path]
Open = Callable[..., Registry]


def test_one_download_for_many(root: str, tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    registry = open_registry(root)
    published = registry.publish_vector(make_vector(max_shard_size=512))
    downloads: list[str] = []

    def source(file: FileEntry) -> Path | Iterable[bytes]:
        downloads.append(file.name)
        return registry.store.source(file)

    caches = [NodeCache(tmp_path / "shared") for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda cache: cache.fetch(published, source), caches))
    assert len(set(folders)) == 1
    assert sorted(downloads) == sorted(file.name for file in published.files)
    assert sum(cache.misses for cache in caches) == 1
    assert sum(cache.hits for cache in caches) == 15
    assert not list((tmp_path / "shared").glob(".*.partial-*"))


READER = """
import os, signal, sys
from prefvec_ray.registry import Registry
from prefvec_ray.registry.cache import NodeCache

class Deadly:
    def source(self, file):
        os.kill(os.getpid(), signal.SIGKILL)

root, cache, limit, *deadly = sys.argv[1:]
registry = Registry.open(root, cache=NodeCache(cache, int(limit)))
if deadly:
    registry.blobs = Deadly()
print(registry.fetch("held"), flush=True)
sys.stdin.read()
"""


def test_what_a_process_reads_is_not_evicted(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    root, cache = tmp_path / "store", tmp_path / "small-cache"
    registry = open_registry(root)
    sizes = {registry.publish_vector(make_vector(name, seed, size=64)).size for seed, name in enumerate("abc")}
    registry.publish_vector(make_vector("held", 9, size=64))
    limit = 2 * max(sizes) + 2048
    command = [sys.executable, "-c", READER, str(root), str(cache), str(limit)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout
    held = Path(reader.stdout.readline().strip())
    small = Registry.open(root, cache=NodeCache(cache, limit))
    for ref in "abc":
        mapped = load_vector(small.fetch(ref))
        small.unpin(ref)  # may go now; what is mapped stays readable
        assert small.cache.size() <= limit
    assert (held / "vector.safetensors").exists()
    assert mapped.digest() == registry.resolve("c").digest
    small.fetch("a")
    with pytest.raises(StoreError, match="running readers hold the rest"):
        small.fetch("b")
    reader.kill()  # its lock goes with it
    reader.wait()
    small.fetch("b")
    assert not held.exists()
    assert small.verify().findings == ()


def test_a_killed_download_leaves_no_lock(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    root, cache = tmp_path / "store", tmp_path / "cache-2"
    registry = open_registry(root)
    registry.publish_vector(make_vector("held"))
    command = [sys.executable, "-c", READER, str(root), str(cache), "100000000", "deadly"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -9
    second = Registry.open(root, cache=NodeCache(cache))
    assert load_vector(second.fetch("held")).digest() == registry.resolve("held").digest

"""Bytes through Ray's object store, for nodes that do not see the storage.

A task on the node of the file yields its pieces as objects; a task or process on the destination's node takes them one
by one. Only references pass through an actor, and only a few pieces are in memory at once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefvec_ray.registry.blobs import hash_file
from prefvec_ray.registry.records import FileEntry
from prefvec_ray.registry.store import Store

PIECE = 32 << 20
AHEAD = 4


class RayBlobs:
    """`registry.Blobs` by way of the node that sees the store; `where()` asks the actor which that is."""

    def __init__(self, where: Callable[[], dict[str, str]]):
        self._where = where

    def stage(self, source: str | Path, gate: Callable[[], None]) -> tuple[str, int]:
        """As `Store.stage`; the store's node pulls the pieces from this one and compares the digest."""
        path = Path(source).absolute()
        digest, size = hash_file(path), path.stat().st_size
        gate()
        where, here = self._where(), ray.get_runtime_context().get_node_id()
        ray.get(
            _receive.options(scheduling_strategy=_on(where["node_id"])).remote(where["uri"], digest, size, path, here)
        )
        return digest, size

    def source(self, file: FileEntry) -> Iterator[Any]:
        """The blob's pieces, as they arrive."""
        where = self._where()
        return _pieces(_send_blob, where["node_id"], where["uri"], file.digest)


@ray.remote(num_cpus=0)
def _receive(uri: str, digest: str, size: int, path: Path, node_id: str) -> None:
    store = Store(uri)
    if not store.has_blob(digest, size):
        store.receive(digest, size, _pieces(_send_file, node_id, path))


@ray.remote(num_cpus=0, num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
def _send_file(path: Path) -> Iterator[np.ndarray]:
    mapped = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    for start in range(0, len(mapped), PIECE):
        yield np.asarray(mapped[start : start + PIECE])


@ray.remote(num_cpus=0, num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
def _send_blob(uri: str, digest: str) -> Iterator[np.ndarray]:
    for piece in Store(uri).read_blob(digest, PIECE):
        yield np.frombuffer(piece, np.uint8)


@ray.remote(num_cpus=0)
def _run(function: Callable[[Store], Any], uri: str) -> Any:
    return function(Store(uri))


def run_on(node_id: str, function: Callable[[Store], Any], uri: str) -> Any:
    """Reference to the result of `function(store)` on a node that sees the store."""
    return _run.options(scheduling_strategy=_on(node_id)).remote(function, uri)


def _pieces(task: Any, node_id: str, *args: Any) -> Iterator[memoryview]:
    for reference in task.options(scheduling_strategy=_on(node_id)).remote(*args):
        yield memoryview(ray.get(reference))


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)

"""The registry against its limits: copying, hashing, reading.

    python benchmarks/bench_registry.py [--megabytes 512] [--manifests 10000] [--clients 8] [--rounds 5]

Each figure is a ratio or rate within this run, rounds alternate, the median counts. The last line is one JSON object:
`publish_over_copy` (publish against copy + fsync + hash), `verify_over_read` (verify against reading and hashing),
`cold_start_s_10k` (open, lease, all records, first answer; in process), `actor_start_s_10k` (the same through Ray),
`resolve_per_s` (through the actor, one call at a time per client, all clients together), `list_s_10k`, `publish_s_10k`.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
import torch

from prefvec_ray.registry import Registry, RegistryClient, start_registry
from prefvec_ray.registry.blobs import hash_file
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.records import FileEntry, VectorDraft, VectorVersion, encode
from prefvec_ray.vectors import save_vector, vector_from_state

BASE = "blake3:" + "0" * 64


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy_and_hash(source: Path, target: Path) -> None:
    """What publishing cannot do without, in the fastest way we know, as durable as the store."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    hash_file(target)


def bytes_per_second(scratch: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """Publishing and verifying one bf16 vector of this size."""
    rows = megabytes * (1 << 20) // 2 // 4096 // 4
    delta = {f"layers.{i}.weight": torch.randn(rows, 4096) * 1e-3 for i in range(4)}
    vector = vector_from_state(delta, preference="helpful", base_fingerprint=BASE, dtype=torch.bfloat16)
    folder = save_vector(vector, scratch / "vector")
    source = folder / "vector.safetensors"
    del vector, delta
    ratios: dict[str, list[float]] = {"publish": [], "verify": [], "copy_s": [], "publish_s": []}
    for number in range(rounds + 1):  # the first round warms the page cache and does not count
        copied, root = scratch / "copy", scratch / f"store-{number}"
        copy_s = seconds(lambda target=copied: copy_and_hash(source, target))
        copied.unlink()
        registry = Registry.open(root, cache=NodeCache(scratch / "cache"))
        publish_s = seconds(lambda registry=registry: registry.publish_vector(folder))
        blob = next((root / "blobs").iterdir())
        read_s = seconds(lambda blob=blob: hash_file(blob))
        verify_s = seconds(registry.verify)
        shutil.rmtree(root)
        if number:
            for key, value in zip(ratios, (publish_s / copy_s, verify_s / read_s, copy_s, publish_s), strict=True):
                ratios[key].append(value)
    return {key: statistics.median(values) for key, values in ratios.items()}


def many_manifests(root: Path, count: int) -> None:
    """A store of `count` versions of 100 names, each with its own little blob."""
    registry = Registry.open(root)
    digest, size = registry.store.stage(__file__)
    for number in range(count):
        name, version = f"vector-{number % 100:03d}", number // 100 + 1
        draft = VectorDraft(
            name=name,
            digest=f"blake3:{number:064x}",
            files=(FileEntry(name="vector.safetensors", digest=digest, size=size),),
            preference=name,
            form="full",
            dtype="bfloat16",
            base_fingerprint=BASE,
            recipe={"beta": 0.1, "steps": 1000, "learning_rate": 5e-7},
            metrics={"gain": number / count, "win_rate": 0.5},
        )
        record = VectorVersion(**draft.model_dump(), version=version, created=float(number))
        path = root / f"vectors/{name}/{version}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(record))


@ray.remote(num_cpus=0)
class Client:
    """One process that resolves one reference after the other."""

    def __init__(self, name: str):
        self.registry = RegistryClient.connect(name)

    def resolve(self, calls: int) -> None:
        for number in range(calls):
            self.registry.resolve(f"vector-{number % 100:03d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--manifests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        scratch = Path(temporary)
        moved = bytes_per_second(scratch, options.megabytes, options.rounds)
        print({key: round(value, 3) for key, value in moved.items()})

        root = scratch / "many"
        many_manifests(root, options.manifests)

        def cold() -> None:
            registry = Registry.open(root)
            with registry.lease.held():
                registry.store.load_mirror()
                registry.resolve("vector-042")

        cold_s = statistics.median(seconds(cold) for _ in range(options.rounds))
        ray.init(num_cpus=options.clients, include_dashboard=False, log_to_driver=False)
        began = time.perf_counter()
        client = start_registry(root, name="bench-registry")
        client.resolve("vector-042")
        actor_s = time.perf_counter() - began
        list_s = statistics.median(seconds(client.list_vectors) for _ in range(3))
        small = save_vector(
            vector_from_state({"w": torch.randn(8, 8)}, preference="small", base_fingerprint=BASE), scratch / "small"
        )
        publishes = [
            seconds(lambda n=n: client.publish_vector(small, name="vector-000", notes=f"{n + 1}")) for n in range(5)
        ]
        clients = [Client.remote("bench-registry") for _ in range(options.clients)]
        ray.get([one.resolve.remote(50) for one in clients])
        calls = 500
        rates = [
            options.clients * calls / seconds(lambda: ray.get([one.resolve.remote(calls) for one in clients]))
            for _ in range(options.rounds)
        ]
        print({"resolve_per_s by round": [round(rate) for rate in rates], "load": os.getloadavg()})
        client.stop()
        ray.shutdown()
    result = {
        "publish_over_copy": moved["publish"],
        "resolve_per_s": statistics.median(rates),
        "cold_start_s_10k": cold_s,
        "verify_over_read": moved["verify"],
        "actor_start_s_10k": actor_s,
        "list_s_10k": list_s,
        "publish_s_10k": statistics.median(publishes),
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()

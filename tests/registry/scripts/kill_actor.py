"""Kill two registries' actors again and again under concurrent publishers, then look at all that was acknowledged.

    python kill_actor.py <folder> <kills> [bucket]

Needs a cluster of its own. Prints one JSON object with what was seen.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from roots import roots, tiny_vector

from prefvec_ray.registry import Registry, RegistryClient, StoreError, start_registry
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.records import VectorVersion

PUBLISHERS = 8
VICTIMS = ("victim-1", "victim-2")


class Publisher:
    """Publishes tiny vectors to every registry in turn: under its own name and under one that all share."""

    def __init__(self, number: int, folder: str):
        self.number, self.folder = number, Path(folder)
        self.registries = {
            victim: RegistryClient.connect(victim, cache=NodeCache(self.folder / "cache")) for victim in VICTIMS
        }

    def publish(self) -> list[tuple[str, str, str]]:
        """(registry, reference, content) of everything that was acknowledged, until the file `stop` exists."""
        acknowledged, count = [], 0
        while not (self.folder / "stop").exists():
            count += 1
            for victim, registry in self.registries.items():
                name = ("shared", f"own-{self.number}")[count % 2]
                source = tiny_vector(self.folder / f"vector-{self.number}-{victim}-{count}", self.number + 1000 * count)
                version = registry.publish_vector(source, name=name, notes=f"{self.number} {count}")
                acknowledged.append((victim, version.ref, version.content))
        return acknowledged


def main(folder: Path, kills: int, where: str) -> None:
    with roots(folder, VICTIMS, where) as stores:
        run(folder, kills, stores)


def run(folder: Path, kills: int, stores: dict[str, str]) -> None:
    ray.init("local", num_cpus=4, namespace="prefvec", include_dashboard=False, log_to_driver=False)
    clients = [
        start_registry(stores[victim], name=victim, cache=NodeCache(folder / "cache"), settle_s=0.2)
        for victim in VICTIMS
    ]
    actor = ray.remote(num_cpus=0)(Publisher)
    publishers = [actor.remote(number, str(folder)) for number in range(PUBLISHERS)]
    work = [publisher.publish.remote() for publisher in publishers]
    torn: list[str] = []
    watchers = [threading.Thread(target=watch, args=(folder, stores[victim], torn)) for victim in VICTIMS]
    for watcher in watchers:
        watcher.start()
    began = time.monotonic()
    with ThreadPoolExecutor(len(VICTIMS)) as pool:
        lives = sum(pool.map(lambda client: kill_often(client, kills // len(VICTIMS)), clients))
    (folder / "stop").touch()
    acknowledged = [entry for result in ray.get(work) for entry in result]
    for watcher in watchers:
        watcher.join()
    for client in clients:
        client.stop()
    registries = {victim: Registry.open(stores[victim], cache=NodeCache(folder / "cache")) for victim in VICTIMS}
    lost = [ref for victim, ref, content in acknowledged if registries[victim].resolve(ref).content != content]
    findings = [finding for registry in registries.values() for finding in registry.verify().findings]
    result = {
        "kills": lives,
        "seconds": round(time.monotonic() - began, 1),
        "acknowledged": len(acknowledged),
        "distinct": len({(victim, ref) for victim, ref, _ in acknowledged}),
        "lost": lost,
        "torn": torn,
        "conditional": all(registry.store.conditional_writes()[0] for registry in registries.values()),
        "harm": [str(finding) for finding in findings if finding.harm],
    }
    print(json.dumps(result))
    ray.shutdown()


def kill_often(client: RegistryClient, kills: int) -> int:
    """Kill the actor at random moments; the number of different processes that died."""
    pids = set()
    for _ in range(kills):
        pid = client.health()["lease"]["pid"]
        time.sleep(random.random() ** 2 * 0.3)
        os.kill(pid, signal.SIGKILL)
        pids.add(pid)
    client.health()
    return len(pids)


def watch(folder: Path, root: str, torn: list[str]) -> None:
    """A reader without the actor: whatever it sees must be whole, and stay what it is."""
    registry = Registry.open(root, cache=NodeCache(folder / "cache"))
    seen: dict[str, VectorVersion] = {}
    while not (folder / "stop").exists():
        for name in registry.names():
            for number in registry.versions(name)[-3:]:
                ref = f"{name}@{number}"
                try:
                    version = registry.resolve(ref)
                    whole = all(registry.store.has_blob(file.digest, file.size) for file in version.files)
                except StoreError as error:
                    torn.append(str(error))
                    continue
                if not whole or seen.setdefault(ref, version) != version:
                    torn.append(ref)
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "folder")

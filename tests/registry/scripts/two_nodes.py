"""Two nodes without shared storage: what is published on one is used on the other, moved once however many ask.

    python two_nodes.py <folder> <vector folder>

The second node runs in a mount namespace of its own where the store's folder is hidden, if the system allows that.
Prints one JSON object.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from prefvec_ray.registry import RegistryClient, start_registry
from prefvec_ray.registry.cache import NodeCache

READERS = 6


class Reader:
    """A process on the second node, with that node's cache."""

    def __init__(self, cache: Path, hidden: bool):
        self.registry = RegistryClient.connect(cache=NodeCache(cache), transport="auto" if hidden else "ray")

    def fetch(self, ref: str) -> dict[str, Any]:
        from prefvec_ray.vectors import load_vector

        vector = load_vector(self.registry.fetch(ref))
        cache = self.registry.cache
        return {"digest": vector.digest(), "misses": cache.misses, "reachable": self.registry.reachable}

    def publish(self, folder: str) -> str:
        return self.registry.publish_vector(folder, name="from-afar").digest


def main(folder: Path, vector: str) -> None:
    root = folder / "store"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(cluster.address, namespace="prefvec", log_to_driver=False)
    registry = start_registry(root, cache=NodeCache(folder / "cache-1"))
    published = registry.publish_vector(vector)
    hide = f"mount -t tmpfs tmpfs {root}"
    hidden = subprocess.run(["unshare", "-m", "sh", "-c", hide], capture_output=True, check=False).returncode == 0
    far = None
    if hidden:
        ray_ = f"exec {Path(sys.executable).parent / 'ray'} start --block --address={cluster.address} --num-cpus=2"
        command = f"{hide} && {ray_} --resources='{json.dumps({'far': 100})}'"
        far = subprocess.Popen(["unshare", "-m", "sh", "-c", command], stdout=subprocess.DEVNULL)
    else:
        cluster.add_node(num_cpus=2, resources={"far": 100})
    while ray.cluster_resources().get("far") is None:
        time.sleep(0.1)
    actor = ray.remote(num_cpus=0)(Reader).options(resources={"far": 1})
    readers = [actor.remote(folder / "cache-2", hidden) for _ in range(READERS)]
    fetched = ray.get([reader.fetch.remote(published.ref) for reader in readers])
    afar = ray.get(readers[0].publish.remote(vector))
    result = {
        "hidden": hidden,
        "equal": {entry["digest"] for entry in fetched} == {published.digest} == {afar},
        "reachable": any(entry["reachable"] for entry in fetched),
        "moved": sum(entry["misses"] for entry in fetched),
        "entries": len(list((folder / "cache-2").glob("*.use"))),
        "findings": [str(finding) for finding in registry.verify().findings],
        "refs": [version.ref for version in registry.list_vectors()],
    }
    print(json.dumps(result))
    registry.stop()
    ray.shutdown()
    if far is not None:
        far.terminate()
        far.wait(30)
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

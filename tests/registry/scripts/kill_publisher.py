"""Publish in a child that is killed at each step of the way, and look at the store after every death.

    python kill_publisher.py <root> <vector folder>

Prints one JSON object: the steps, and for each whether a version was visible and whether the store was sound.
"""

import json
import os
import signal
import sys
from pathlib import Path

import prefvec_ray.vectors  # noqa: F401 - imported once, before the children are forked
from prefvec_ray.registry import Registry
from prefvec_ray.registry.cache import NodeCache


def publish(root: str, folder: str, kill_at: int | None) -> int:
    """In a child: publish, and die just after step `kill_at`. Returns the number of steps seen."""
    registry, seen = Registry.open(root, cache=NodeCache(Path(root).parent / "cache"), ttl_s=1, settle_s=0.02), []

    def step(name: str) -> None:
        seen.append(name)
        if len(seen) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    registry.store.step = step
    registry.publish_vector(folder, creator="child")
    return len(seen)


def in_child(root: str, folder: str, kill_at: int | None) -> int:
    """Exit status of a forked child: its number of steps, or -9."""
    child = os.fork()
    if child == 0:
        os._exit(publish(root, folder, kill_at))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: str, folder: str) -> None:
    steps = in_child(f"{root}-count", folder, None)
    outcomes = []
    for kill_at in range(steps):
        where = f"{root}-{kill_at}"
        status = in_child(where, folder, kill_at)
        # a forked child looks, since threads of a hashing parent do not survive the next fork
        look = os.fork()
        if look == 0:
            registry = Registry.open(where, cache=NodeCache(Path(root).parent / "cache"))
            report = registry.verify() if (Path(where) / "registry.json").exists() else None
            visible = len(registry.list_vectors())
            os._exit(visible + (2 if report is None or report.sound else 0))
        after = os.waitstatus_to_exitcode(os.waitpid(look, 0)[1])
        again = in_child(where, folder, None)
        final = os.fork()
        if final == 0:
            registry = Registry.open(where, cache=NodeCache(Path(root).parent / "cache"))
            registry.gc(apply=True, grace_s=0)
            clean = registry.verify().findings == () and [v.ref for v in registry.list_vectors()] == ["helpful@1"]
            os._exit(not clean)
        mended = os.waitstatus_to_exitcode(os.waitpid(final, 0)[1]) == 0
        seen = {"visible": after % 2, "sound": after >= 2}
        outcomes.append({"status": status, "retried": again >= 0, "clean": mended, **seen})
    print(json.dumps({"steps": steps, "outcomes": outcomes}))


if __name__ == "__main__":
    main(*sys.argv[1:])

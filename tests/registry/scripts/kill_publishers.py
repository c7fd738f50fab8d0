"""Kill publishers at random moments while others publish, then look at all that was acknowledged.

    python kill_publishers.py <folder> <kills> [bucket]

No actor and no Ray: every publisher takes the lease for itself. Prints one JSON object with what was seen.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from roots import roots, tiny_vector

from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.registry.cache import NodeCache

PUBLISHERS = 3
LONGEST_LIFE_S = {"folder": 0.5, "bucket": 6.0}
"""of a publisher; in a bucket, the lease of one that was killed ends after `ttl_s` of silence"""


def open_registry(root: str, folder: Path) -> Registry:
    return Registry.open(root, cache=NodeCache(folder / "cache"), ttl_s=1.0, settle_s=0.1)


def publish(root: str, folder: Path, number: int) -> None:
    """Publish new vectors until killed or until the file `stop` exists; note each that is acknowledged."""
    registry = open_registry(root, folder)
    with (folder / f"acknowledged-{number}").open("a") as log:
        while not (folder / "stop").exists():
            name = random.choice(["shared", f"own-{number}"])
            source = tiny_vector(folder / f"vector-{os.urandom(8).hex()}", int.from_bytes(os.urandom(4)))
            try:
                version = registry.publish_vector(source, name=name, creator="publisher")
            except (
                StoreError,
                ValueError,
            ):  # the lease passed to another, or could not be had in time: not acknowledged
                continue
            log.write(json.dumps([version.ref, version.content]) + "\n")
            log.flush()


def main(folder: Path, kills: int, where: str) -> None:
    spawned = multiprocessing.get_context("forkserver")  # a process that has only imported, so that children start soon
    spawned.set_forkserver_preload(["prefvec_ray.registry.registry", "prefvec_ray.vectors", "roots"])
    with roots(folder, ("store",), where) as found:
        root, killed, born = found["store"], 0, 0
        running: list[multiprocessing.process.BaseProcess] = []
        began = time.monotonic()
        while killed < kills:
            while len(running) < PUBLISHERS:
                running.append(spawned.Process(target=publish, args=(root, folder, born), daemon=True))
                running[-1].start()
                born += 1
            victim = running.pop(0)
            log, deadline = folder / f"acknowledged-{born - len(running) - 1}", time.monotonic() + 120
            while not log.exists() and time.monotonic() < deadline:  # it has begun to publish
                time.sleep(0.01)
            time.sleep(random.random() ** 2 * LONGEST_LIFE_S[where])
            os.kill(victim.pid or 0, signal.SIGKILL)
            victim.join()
            killed += 1
        deadline = time.monotonic() + 120
        while not acknowledged(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        (folder / "stop").touch()
        for publisher in running:
            publisher.join(120)
        print(json.dumps(judged(root, folder) | {"kills": killed, "seconds": round(time.monotonic() - began, 1)}))


def acknowledged(folder: Path) -> list[tuple[str, str]]:
    """(reference, content) of everything that any publisher noted."""
    lines = [line for log in folder.glob("acknowledged-*") for line in log.read_text().splitlines(keepends=True)]
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def judged(root: str, folder: Path) -> dict[str, object]:
    registry = open_registry(root, folder)
    published = acknowledged(folder)
    findings = registry.verify().findings
    return {
        "acknowledged": len(published),
        "distinct": len({ref for ref, _ in published}),
        "lost": [ref for ref, content in published if registry.resolve(ref).content != content],
        "harm": [str(finding) for finding in findings if finding.harm],
        "conditional": registry.store.conditional_writes()[0] is not None,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "folder")

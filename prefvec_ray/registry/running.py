"""The registry actors of a Ray cluster: their names, which of them run, and how one is ended."""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import ray

from prefvec_ray.common.cluster import NAMESPACE
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.names import THROUGH_RAY
from prefvec_ray.registry.store import Store

ASK_SECONDS = 5.0
"""for an actor to answer when it is listed or ended"""
STOP_SECONDS = 15.0
"""for a killed actor to be gone"""


def actor_name(store: Store) -> str:
    """`prefvec-registry-<8 hexadecimal digits>`, from the store's identity and its path. A copy of a store has the same
    identity, and two nodes may have different folders at the same path.
    """
    place = os.path.realpath(store.folder) if store.folder is not None else store.label
    return f"prefvec-registry-{hashlib.blake2b(f'{store.uid} {place}'.encode(), digest_size=4).hexdigest()}"


def running_registries(namespace: str = NAMESPACE) -> dict[str, str]:
    """Name -> root of every registry actor of the cluster; an actor that does not answer has the root `?`."""
    actors = {}
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == namespace:
            with contextlib.suppress(ValueError):  # it ended in between
                actors[found["name"]] = ray.get_actor(found["name"], namespace)
    methods = ("call", "where", "root", "leave")
    asked = {n: actor.root.remote() for n, actor in actors.items() if all(hasattr(actor, m) for m in methods)}
    ready, _ = ray.wait([*asked.values()], num_returns=len(asked), timeout=ASK_SECONDS) if asked else ([], [])
    roots = {}
    for name, answer in sorted(asked.items()):
        try:
            roots[name] = ray.get(answer)["label"] if answer in ready else "?"
        except ray.exceptions.RayError:
            roots[name] = "?"
    return roots


def stop_registry(where: str | Path, *, namespace: str = NAMESPACE) -> str:
    """End the actor of the registry at `where` (a folder, a bucket, or `ray:<name>`). The store keeps everything.

    Returns the actor's name. Raises InputError where none runs for this registry.
    """
    running = running_registries(namespace)
    if str(where).startswith(THROUGH_RAY):
        name = str(where).removeprefix(THROUGH_RAY)
        if not name and len(running) == 1:
            (name,) = running
    else:
        store = Store.open(where, create=False)
        roots = {root: name for name, root in running.items()}
        name = roots.get(store.label, actor_name(store))
    if name not in running:
        raise InputError(f"registry {where}: no actor to stop; {listing(running)}")
    end(ray.get_actor(name, namespace), name, namespace)
    return name


def listing(running: dict[str, str]) -> str:
    """What a user can put after `--registry`."""
    if not running:
        return "no registry actor runs in this Ray cluster; training and start_registry(root) start one"
    return "running are " + ", ".join(f"ray:{name} ({root})" for name, root in running.items())


def end(actor: Any, name: str, namespace: str = NAMESPACE) -> None:
    """Kill an actor and wait until its name is free; its lease is given back first where it still answers."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actor.leave.remote(), timeout=ASK_SECONDS)
    ray.kill(actor, no_restart=True)
    until = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ValueError):  # the name is gone
        while time.monotonic() < until:
            ray.get_actor(name, namespace)
            time.sleep(0.05)

"""One way to name a registry: a folder, a bucket, or `ray:<name>` for a running registry actor."""

import os

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.registry import Registry

THROUGH_RAY = "ray:"


def open_registry(where: str, *, create: bool = False) -> Registry:
    """The registry at `where`: a folder, `s3://bucket/prefix`, or `ray:<name>`, which goes through the actor of that
    name and joins the Ray cluster for it (`ray:` alone: the only one that runs there).

    Raises InputError where there is no registry, unless `create` lets the first publication make one, and where no
    actor of that name runs; the message lists those that do.
    """
    if not where.startswith(THROUGH_RAY):
        return Registry.open(where, create=create)
    from prefvec_ray.registry.actor import RegistryClient

    join_ray()
    return RegistryClient.connect(where.removeprefix(THROUGH_RAY) or None)


def join_ray() -> None:
    """Join the Ray cluster of RAY_ADDRESS or of this machine, unless this process is in one already; start none.

    Raises InputError where no cluster runs.
    """
    import ray
    from ray._private.services import find_gcs_addresses
    from rich.console import Console

    from prefvec_ray.common.cluster import connect

    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "") in ("", "auto"):
        if not find_gcs_addresses():
            raise InputError("no Ray cluster runs on this machine; start one (`ray start --head`), or set RAY_ADDRESS")
        os.environ["RAY_ADDRESS"] = "auto"
    connect(Console(quiet=True))

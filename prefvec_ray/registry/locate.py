"""One way to name a registry: a folder, a bucket, or `ray:<name>` for a running registry actor."""

from prefvec_ray.common.extras import require
from prefvec_ray.registry.names import THROUGH_RAY
from prefvec_ray.registry.registry import Registry


def open_registry(where: str, *, create: bool = False) -> Registry:
    """The registry at `where`: a folder, `s3://bucket/prefix`, or `ray:<name>`, which goes through the actor of that
    name and joins the Ray cluster for it (`ray:` alone: the only one that runs there).

    Raises InputError where there is no registry, unless `create` lets the first publication make one, and where no
    actor of that name runs; the message lists those that do.
    """
    if not where.startswith(THROUGH_RAY):
        return Registry.open(where, create=create)
    require("registry", "ray")
    from prefvec_ray.common.cluster import join
    from prefvec_ray.registry.actor import RegistryClient

    join()
    return RegistryClient.connect(where.removeprefix(THROUGH_RAY) or None)

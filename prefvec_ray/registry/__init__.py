"""The registry: what was trained, under names that never lie. See docs/registry.md.

`Registry` needs no Ray; `start_registry` and `RegistryClient` import it when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from prefvec_ray.registry.errors import LeaseLost, StoreError
from prefvec_ray.registry.records import (
    FileEntry,
    Move,
    PresetVersion,
    Served,
    Tagging,
    VectorVersion,
    serving_fingerprint,
)
from prefvec_ray.registry.registry import Registry

if TYPE_CHECKING:
    from prefvec_ray.registry.actor import RegistryClient, start_registry

__all__ = [
    "FileEntry",
    "LeaseLost",
    "Move",
    "PresetVersion",
    "Registry",
    "RegistryClient",
    "Served",
    "StoreError",
    "Tagging",
    "VectorVersion",
    "serving_fingerprint",
    "start_registry",
]


def __getattr__(name: str) -> Any:
    if name in ("RegistryClient", "start_registry"):
        from prefvec_ray.registry import actor

        return getattr(actor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

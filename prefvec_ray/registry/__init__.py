"""The registry of trained vectors and presets: the content of a version never changes. See docs/registry.md.

`Registry` needs no Ray; `start_registry`, `stop_registry` and `RegistryClient` import it when they are first used.
"""

from typing import TYPE_CHECKING, Any

from prefvec_ray.registry.errors import LeaseLost, StoreError
from prefvec_ray.registry.locate import open_registry
from prefvec_ray.registry.names import THROUGH_RAY
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
    from prefvec_ray.registry.running import stop_registry

__all__ = [
    "THROUGH_RAY",
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
    "open_registry",
    "serving_fingerprint",
    "start_registry",
    "stop_registry",
]


def __getattr__(name: str) -> Any:
    if name in ("RegistryClient", "start_registry", "stop_registry"):
        from prefvec_ray.common.extras import require

        require("registry", "ray")
        from prefvec_ray.registry import actor, running

        return getattr(running if name == "stop_registry" else actor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

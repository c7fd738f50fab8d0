"""The registry: what was trained, under names that never lie. See docs/registry.md."""

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

__all__ = [
    "FileEntry",
    "LeaseLost",
    "Move",
    "PresetVersion",
    "Registry",
    "Served",
    "StoreError",
    "Tagging",
    "VectorVersion",
    "serving_fingerprint",
]

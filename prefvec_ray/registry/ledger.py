"""Immutable records under numbered keys: reading them, and adding the next one. What `Catalog` stands on."""

import contextlib
import functools
import importlib.metadata
import threading
from typing import Any, Literal, TypeVar

from prefvec_ray.errors import InputError
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.names import check_version
from prefvec_ray.registry.records import (
    PresetDraft,
    PresetVersion,
    Record,
    VectorDraft,
    VectorVersion,
    decode,
    encode,
)
from prefvec_ray.registry.store import Store

Subject = Literal["vectors", "presets"]
R = TypeVar("R", bound=Record)
V = TypeVar("V", VectorVersion, PresetVersion)


class Ledger:
    """The records of one store. `lock` is held by whoever reads and then writes; see `Catalog`."""

    def __init__(self, store: Store, lease: Lease):
        self.store, self.lease = store, lease
        self.lock = threading.RLock()
        self._parsed: dict[str, Record] = {}

    def numbers(self, folder: str) -> list[int]:
        stems = (name.removesuffix(".json") for name in self.store.children(folder))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def versions(self, subject: Subject, name: str) -> list[int]:
        """Numbers in use, oldest first; retired ones are left out."""
        retired = set(self.numbers(f"retired/{name}")) if subject == "vectors" else set()
        return [number for number in self.numbers(f"{subject}/{name}") if number not in retired]

    def get(self, subject: Subject, name: str, number: int, model: type[V]) -> V:
        record = self.load(f"{subject}/{name}/{number}.json", model)
        if (record.name, record.version) != (name, number):
            raise StoreError(f"{subject}/{name}/{number}.json: holds {record.ref}; restore it from a copy or bundle")
        return record

    def load(self, key: str, model: type[R]) -> R:
        """A record by key; parsed once where the store is mirrored, since records never change."""
        known = self._parsed.get(key)
        if isinstance(known, model):
            return known
        data = self.store.read(key)
        if data is None:
            raise StoreError(f"{self.store.label}/{key}: is missing; restore it from a copy or bundle")
        record = decode(data, model, key)
        if self.store.mirrored:
            self._parsed[key] = record
        return record

    def commit(
        self,
        subject: Subject,
        draft: VectorDraft | PresetDraft,
        model: type[V],
        version: int | None,
        creator: str,
        **extra: Any,
    ) -> V:
        """The next version of `draft.name`, or the version that already holds this very draft."""
        content = draft.content
        with self.lock, self.lease.held():
            numbers = self.numbers(f"{subject}/{draft.name}")
            if not numbers:
                self._check_case(subject, draft.name)
            for number in [n for n in reversed(numbers) if version in (None, n)]:
                with contextlib.suppress(StoreError, InputError):
                    known = self.get(subject, draft.name, number, model)
                    if known.content == content and number in self.versions(subject, draft.name):
                        return known
            following = numbers[-1] + 1 if numbers else 1
            if version is not None and check_version(version) in numbers:
                raise InputError(f"{draft.name}@{version} exists with other content, and a version never changes")
            if version is not None and version < following:
                raise InputError(f"{draft.name}@{version}: the next free version is {following}")
            number = version or following
            record = model(**draft.model_dump(), version=number, **{**self.stamp(creator), **extra})
            self.write(f"{subject}/{draft.name}/{number}.json", record)
            return record

    def _check_case(self, subject: Subject, name: str) -> None:
        """Names that differ only in case would be one folder on some disks."""
        for other in self.store.children(subject):
            if other.lower() == name.lower():
                raise InputError(f"name {name}: there is already '{other}', which differs only in case; use that")

    def write(self, key: str, record: Record) -> None:
        try:
            self.store.create(key, encode(record), self.lease.check)
        except FileExistsError:
            raise StoreError(f"{self.store.label}/{key}: was just written by somebody else; try again") from None

    def stamp(self, creator: str) -> dict[str, Any]:
        return {"created": self.store.clock(), "creator": creator, "epoch": self.lease.epoch}


@functools.cache
def libraries() -> dict[str, str]:
    found = {}
    for package in ("prefvec-ray", "torch", "transformers", "safetensors", "trl", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

"""Immutable records under numbered keys: what a reference stands for, and how the next record is added."""

import contextlib
import functools
import importlib.metadata
import re
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.names import (
    LARGEST_CHOSEN_VERSION,
    LARGEST_VERSION,
    NAME,
    Ref,
    check_case,
    check_version,
    parse_ref,
    shown,
)
from prefvec_ray.registry.records import (
    Move,
    PresetDraft,
    PresetVersion,
    Record,
    Retirement,
    Subject,
    Tagging,
    VectorDraft,
    VectorVersion,
    build,
    decode,
    encode,
    key_of,
)
from prefvec_ray.registry.store import Store

R = TypeVar("R", bound=Record)
S = TypeVar("S", Move, Tagging)
V = TypeVar("V", VectorVersion, PresetVersion)
NUMBERED = re.compile(r"([1-9][0-9]{0,8})\.json")
TRIES = 5


class Taken(StoreError):  # noqa: N818 - as in errors.py
    """The key was taken meanwhile by another writer's record, which stays."""


class Ledger:
    """The records of one store. `lock` is held by whoever reads and then writes; see `Catalog`."""

    def __init__(self, store: Store, lease: Lease):
        self.store, self.lease = store, lease
        self.lock = threading.RLock()
        self._parsed: dict[str, Record] = {}

    def names(self, folder: str) -> list[str]:
        """Names below a folder. Whatever else lies there is `verify`'s business."""
        return [name for name in self.store.children(folder) if NAME.fullmatch(name)]

    def numbers(self, folder: str) -> list[int]:
        """Numbers of the records in a folder, ascending. Files with other names are `verify`'s business."""
        found = map(NUMBERED.fullmatch, self.store.children(folder))
        return sorted(int(match[1]) for match in found if match)

    def history(self, folder: str, model: type[S]) -> list[S]:
        """Every step below a folder, oldest first. StoreError where one is missing, which `repair` closes."""
        numbers = self.numbers(folder)
        if missing := sorted(set(range(1, len(numbers) + 1)) - set(numbers)):
            raise StoreError(
                f"{self.store.label}/{folder}/{missing[0]}.json: is missing; restore it from a copy, or mark it as"
                " lost with `prefvec registry repair --apply`"
            )
        return [self.load(f"{folder}/{number}.json", model) for number in numbers]

    def newest(self, folder: str, model: type[S]) -> S | None:
        """The step that counts; None where there is no history. StoreError where it was lost."""
        numbers = self.numbers(folder)
        if not numbers:
            return None
        step = self.load(f"{folder}/{numbers[-1]}.json", model)
        if step.kind.startswith("lost"):
            raise StoreError(f"{self.store.label}/{folder}: the newest step was lost; set it again")
        return step

    def versions(self, subject: Subject, name: str) -> list[int]:
        """Numbers in use, oldest first; retired ones are left out."""
        retired = set(self.numbers(f"retired/{name}")) if subject == "vectors" else set()
        return [number for number in self.numbers(f"{subject}/{name}") if number not in retired]

    def get(self, subject: Subject, name: str, number: int, model: type[V]) -> V:
        return self.load(f"{subject}/{name}/{number}.json", model)

    def each(self, subject: Subject, model: type[V]) -> Iterator[tuple[str, V | StoreError | InputError]]:
        """(reference, record, or what is wrong with it) of every version that ever was, retired ones included."""
        for name in self.names(subject):
            for number in self.numbers(f"{subject}/{name}"):
                found: V | StoreError | InputError
                try:
                    found = self.get(subject, name, number, model)
                except (StoreError, InputError) as error:
                    found = error
                yield f"{name}@{number}", found

    def resolve(self, subject: Subject, ref: str, model: type[V]) -> V:
        """The record that a reference stands for now. InputError where there is none."""
        parsed = parse_ref(ref)
        numbers = self.versions(subject, parsed.name)
        number = parsed.version
        if parsed.alias is not None:
            number = self.target(subject, parsed.name, parsed.alias)
        elif number is None and numbers:
            number = numbers[-1]
        if number not in numbers or number is None:
            raise InputError(self.unknown(subject, parsed))
        return self.get(subject, parsed.name, number, model)

    def unknown(self, subject: Subject, ref: Ref) -> str:
        """Why there is no such version, and which there are."""
        what = subject[:-1]
        numbers = self.versions(subject, ref.name)
        if ref.version and subject == "vectors" and ref.version in self.numbers(f"retired/{ref.name}"):
            why = self.load(f"retired/{ref.name}/{ref.version}.json", Retirement).reason
            return f"{what} {ref} was retired ({why}); use another version: {numbers}"
        if not numbers:
            near = ", ".join(self.names(subject)[:10]) or "none yet"
            return f"no {what} {shown(ref.name)} in {self.store.label}; there are: {near}"
        aliases = self.aliases(subject, ref.name)
        return f"no {what} {ref}; there are versions {numbers[0]} to {numbers[-1]}, aliases {aliases}"

    def aliases(self, subject: Subject, name: str) -> dict[str, int]:
        """alias -> the version it points at now."""
        targets = {alias: self.target(subject, name, alias) for alias in self.names(f"refs/{subject}/{name}")}
        return {alias: version for alias, version in targets.items() if version is not None}

    def target(self, subject: Subject, name: str, alias: str) -> int | None:
        """The version that an alias points at; None where it is not set."""
        move = self.newest(f"refs/{subject}/{name}/{alias}", Move)
        return move.version if move else None

    def load(self, key: str, model: type[R]) -> R:
        """A record by key; parsed once where the store is mirrored, since records never change."""
        known = self._parsed.get(key)
        if isinstance(known, model):
            return known
        data = self.store.read(key)
        if data is None:
            raise StoreError(f"{self.store.label}/{key}: is missing; restore it from a copy or bundle")
        record = decode(data, model, key)
        if (place := key_of(record)) != key:
            held = getattr(record, "ref", place)
            raise StoreError(f"{self.store.label}/{key}: holds {held}; restore it from a copy or bundle")
        if self.store.mirrored:
            self._parsed[key] = record
        return record

    def forget(self, key: str) -> None:
        """A record was replaced, which only `repair` does: read it again."""
        self._parsed.pop(key, None)

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
        if version is not None:
            check_version(version)
        with self.lock, self.lease.held():
            for _ in range(TRIES):
                with contextlib.suppress(Taken):  # a writer whose lease had ended: its number counts as used
                    return self._commit(subject, draft, content, model, version, creator, extra)
        raise StoreError(f"{self.store.label}: others write {draft.name} at the same time; try again")

    def _commit(
        self,
        subject: Subject,
        draft: VectorDraft | PresetDraft,
        content: str,
        model: type[V],
        version: int | None,
        creator: str,
        extra: dict[str, Any],
    ) -> V:
        """One try of `commit`. Taken: somebody else has the number now."""
        numbers = self.numbers(f"{subject}/{draft.name}")
        if not numbers:
            check_case(draft.name, self.store.children(subject))
        for number in [n for n in reversed(numbers) if version in (None, n)]:
            with contextlib.suppress(StoreError, InputError):
                known = self.get(subject, draft.name, number, model)
                if known.content == content and number in self.versions(subject, draft.name):
                    return known
        following = numbers[-1] + 1 if numbers else 1
        if version in numbers:
            raise InputError(f"{draft.name}@{version} exists with other content, and a version never changes")
        if version is not None and version < following:
            raise InputError(f"{draft.name}@{version}: the next free version is {following}")
        if version is not None and version > max(LARGEST_CHOSEN_VERSION, following):
            raise InputError(
                f"{draft.name}@{version}: a chosen number is at most {LARGEST_CHOSEN_VERSION}; leave it out to get"
                f" version {following}"
            )
        if following > LARGEST_VERSION:
            raise InputError(f"{draft.name}: has no free version number left; publish under another name")
        number = version or following
        record = build(model, **draft.model_dump(), version=number, **{**self.stamp(creator), **extra})
        self.write(f"{subject}/{draft.name}/{number}.json", record)
        return record

    def write(self, key: str, record: Record) -> None:
        try:
            self.store.create(key, encode(record), self.lease.check)
        except FileExistsError:
            raise Taken(f"{self.store.label}/{key}: was just written by somebody else; try again") from None

    def stamp(self, creator: str) -> dict[str, Any]:
        return {"created": self.store.clock(), "creator": creator, "epoch": self.lease.epoch}


@functools.cache
def libraries() -> dict[str, str]:
    found = {}
    for package in ("prefvec-ray", "torch", "transformers", "safetensors", "trl", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

"""Maintenance of a store: `collect` (gc) deletes what nobody needs, `repair` marks lost steps of a history,
`check_store` and `check_cache` (doctor) report on store and cache. `verify.py` has `verify`.

Only `collect` deletes. It holds the lease meanwhile, and stops where it cannot know what is needed. A publisher whose
staged blob it deleted stages it again, so a clock that jumps costs time and no data.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.ledger import NUMBERED
from prefvec_ray.registry.names import VERSION
from prefvec_ray.registry.records import Move, Tagging, build, decode, encode, key_of
from prefvec_ray.registry.store import Store
from prefvec_ray.registry.verify import Frozen, verify

if TYPE_CHECKING:
    from prefvec_ray.registry.catalog import Catalog

Level = Literal["ok", "warning", "problem"]


class Collection(Frozen):
    """What `gc` deleted, or would delete: blobs with their sizes, leftovers of writers that died."""

    applied: bool
    blobs: dict[str, int]
    staging: tuple[str, ...]
    spared: dict[str, str]
    """orphan blob -> why it stays"""

    @property
    def bytes(self) -> int:
        return sum(self.blobs.values())


class Check(Frozen):
    """One line of `doctor`."""

    level: Level
    what: str
    detail: str


def collect(catalog: "Catalog", *, apply: bool = False, grace_s: float = 3600.0) -> Collection:
    """Blobs that no version needs (retired versions need none) and leftovers of dead writers; deleted with `apply`.

    Orphans younger than `grace_s` stay, so that publishers seldom have to stage twice. Raises StoreError, and deletes
    nothing, while a manifest is damaged or of a newer release: what it needs is not known.
    """
    store = catalog.store
    store.require()
    with catalog.lease.held():
        needed: set[str] = set()
        for ref, manifest, retired in catalog.all_vectors():
            if manifest is None:
                raise StoreError(f"{store.label}: {ref} cannot be read, so what it needs is not known; run verify")
            if not retired:
                needed |= {file.digest for file in manifest.files}
        doomed, spared = {}, {}
        for digest, (size, changed) in store.blobs().items():
            if digest in needed:
                continue
            if store.clock() - changed < grace_s:
                spared[digest] = f"younger than {grace_s:g} s; it may be about to be published"
            else:
                doomed[digest] = size
        staging = store.stale_staging()
        if apply:
            catalog.lease.check()
            for digest in doomed:
                store.delete_blob(digest)
            for path in staging:
                path.unlink(missing_ok=True)
    return Collection(applied=apply, blobs=doomed, spared=spared, staging=tuple(path.name for path in staging))


def repair(catalog: "Catalog", *, apply: bool = False) -> list[str]:
    """Steps of aliases' and tags' histories that are missing or damaged, by key; with `apply` each is marked as lost.

    A marked step says that it was lost, and the history goes on behind it. Where the newest step was lost, alias and
    tags mean nothing until they are set again: where they pointed is not guessed. A damaged record is kept in
    `damaged/`. Steps of a newer release are left alone.
    """
    store, lost = catalog.store, []
    with catalog.lease.held():
        folders: dict[str, set[int]] = {}
        for key in store.record_keys():
            folder, _, file = key.rpartition("/")
            if key.startswith(("refs/", "tags/")) and (match := NUMBERED.fullmatch(file)):
                folders.setdefault(folder, set()).add(int(match[1]))
        for folder, numbers in folders.items():
            if max(numbers) > 2 * len(numbers) + 1000:
                raise StoreError(f"{store.label}/{folder}: record {max(numbers)} of {len(numbers)}; look at it by hand")
            for number in range(1, max(numbers) + 1):
                if (marker := _lost_step(store, folder, number)) is not None:
                    key = key_of(marker)
                    lost.append(key)
                    if apply:
                        catalog.lease.check()
                        store.set_aside(key)
                        store.create(key, encode(marker), catalog.lease.check)
                        catalog.ledger.forget(key)
    return lost


def _lost_step(store: Store, folder: str, number: int) -> Move | Tagging | None:
    """What to write in the place of a missing or damaged step; None where it is sound, or of a newer release."""
    kind, subject, name, which = folder.split("/") if folder.count("/") == 3 else ("", "", "", "")
    model: type[Move] | type[Tagging] = Move if kind == "refs" else Tagging
    try:
        key = f"{folder}/{number}.json"
        if key_of(decode(store.read_fresh(key) or b"", model, key)) == key:
            return None
    except InputError:
        return None
    except StoreError:
        pass
    common: dict[str, Any] = {
        "subject": subject,
        "name": name,
        "sequence": number,
        "reason": "the record of this step was lost",
        "request": "repair",
        "created": store.clock(),
    }
    try:
        if kind == "refs":
            return build(Move, kind="lost-move", alias=which, version=None, previous=None, **common)
        version = int(which) if VERSION.fullmatch(which) else 0
        return build(Tagging, kind="lost-tagging", version=version, tags={}, **common)
    except InputError:  # a folder that no alias or version can have
        return None


def check_store(store: Store) -> list[Check]:
    """What may be wrong with a store, as seen from here; reads records and sizes, not the blobs. Changes nothing."""
    try:
        checks = [Check(level="ok", what="store", detail=f"{store.label}, id {store.uid}")]
    except (StoreError, InputError) as error:
        return [Check(level="problem", what="store", detail=str(error))]
    if store.folder is not None:
        writable = os.access(store.folder, os.W_OK)
        checks.append(_check(writable, "store writable", str(store.folder) if writable else "may only read here"))
        usage = shutil.disk_usage(store.folder)
        advice = "" if usage.free > usage.total // 20 else "; make room with `prefvec registry gc --apply`"
        checks.append(_check(not advice, "store space", f"{usage.free / 1e9:.1f} GB free{advice}"))
    else:
        writer, why = store.conditional_writes()
        detail = "the bucket refuses to overwrite a record" if writer else f"not used ({why}): the lease alone protects"
        checks.append(Check(level="ok", what="conditional writes", detail=detail))
    claim = Lease(store, "doctor").claim()
    writes = claim is not None and not claim.released
    who = f"{claim.owner} (pid {claim.pid} on {claim.host}) writes" if claim and writes else "nobody writes"
    checks.append(Check(level="ok", what="writer", detail=who))
    quick = verify(store, read_bytes=False)
    found = f"{quick.records} records, {quick.blobs} blobs, {quick.bytes / 1e9:.2f} GB"
    checks.append(_check(quick.sound, "records and sizes", found, "problem"))
    for finding in quick.findings:
        level: Level = "problem" if finding.harm else "warning"
        checks.append(Check(level=level, what=finding.kind, detail=f"{finding.path}: {finding.detail}"))
    return checks


def check_cache(cache: NodeCache) -> list[Check]:
    """What may be wrong with this node's cache; hashes all of it. Changes nothing."""
    free = shutil.disk_usage(_existing(cache.folder)).free
    room = f"{cache.folder}: {cache.size() / 1e9:.2f} of {cache.limit_bytes / 1e9:.0f} GB, disk has {free / 1e9:.1f} GB"
    damaged = cache.check()
    detail = "every file as it was fetched" if not damaged else f"{damaged[0]} changed; the next fetch replaces it"
    return [_check(free > 1e9, "cache", room), _check(not damaged, "cached files", detail)]


def _check(good: bool, what: str, detail: str, level: Level = "warning") -> Check:
    return Check(level="ok" if good else level, what=what, detail=detail)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)

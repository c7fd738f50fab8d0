"""Looking after a store: `verify` finds what is wrong, `collect` (gc) deletes what nobody needs, `check_store` and
`check_cache` (doctor) look around.

`collect` alone deletes. It holds the lease meanwhile and stops where it cannot know what is needed; a publisher whose
staged blob it took stages it again, so that a clock that jumps costs time and no bytes.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from prefvec_ray.errors import InputError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.catalog import Catalog
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import CLAIM, Lease
from prefvec_ray.registry.records import (
    Claim,
    Hold,
    Move,
    PresetVersion,
    Record,
    Retirement,
    Served,
    Tagging,
    VectorVersion,
    decode,
)
from prefvec_ray.registry.store import MARKER, RECORD_FOLDERS, Marker, Store, blob_key, hash_file

MODELS: dict[str, type[Record]] = {
    "vectors": VectorVersion,
    "presets": PresetVersion,
    "refs": Move,
    "tags": Tagging,
    "retired": Retirement,
    "served": Served,
}
Level = Literal["ok", "warning", "problem"]
Progress = Callable[[str, int], None]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(Frozen):
    """One thing that is not as it should be. `harm`: something that was published is affected."""

    kind: Literal[
        "corrupt record",
        "newer record",
        "missing record",
        "dangling reference",
        "corrupt blob",
        "missing blob",
        "orphan blob",
        "stale staging",
        "stray file",
    ]
    path: str
    detail: str
    needed_by: tuple[str, ...] = ()

    @property
    def harm(self) -> bool:
        return self.kind not in ("orphan blob", "stale staging", "stray file")


class Verification(Frozen):
    """What `verify` looked at and found."""

    root: str
    records: int
    blobs: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Is everything that was published whole? (Orphans and leftovers do no harm.)"""
        return not any(finding.harm for finding in self.findings)


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


def verify(store: Store, *, read_bytes: bool = True, progress: Progress = lambda what, size: None) -> Verification:
    """Read everything and compare: records with their digests, blobs with theirs, references with what they name.

    Changes nothing and needs no lease; a version that is published meanwhile may show as an orphan blob. With
    `read_bytes=False` blobs are only measured. `progress(path, bytes)` is called after each blob.
    """
    findings: list[Finding] = []
    records = _verify_records(store, findings)
    needed: dict[str, dict[str, int]] = {}
    retired = {f"{r.name}@{r.version}" for r in records.values() if isinstance(r, Retirement)}
    for record in records.values():
        if isinstance(record, VectorVersion):
            for file in record.files:
                needed.setdefault(file.digest, {})[record.ref] = file.size
    blobs = store.blobs()
    for digest, users in needed.items():
        live = tuple(sorted(users.keys() - retired))
        if digest not in blobs and live:
            detail = f"{max(users.values())} bytes are gone; publish the original files again to mend it"
            findings.append(Finding(kind="missing blob", path=blob_key(digest), detail=detail, needed_by=live))
    for digest, (size, _) in sorted(blobs.items()):
        expected, live = needed.get(digest, {}), tuple(sorted(needed.get(digest, {}).keys() - retired))
        wrong = None
        if expected and size != max(expected.values()):
            wrong = f"{size} bytes instead of {max(expected.values())}"
        elif read_bytes and _hash(store, digest) != digest:
            wrong = "the bytes changed"
        if wrong:
            detail = f"{wrong}; publish the original files again to mend it"
            findings.append(Finding(kind="corrupt blob", path=blob_key(digest), detail=detail, needed_by=live))
        elif not live:
            detail = f"{size} bytes that nothing refers to; `gc` deletes them"
            findings.append(Finding(kind="orphan blob", path=blob_key(digest), detail=detail))
        progress(blob_key(digest), size)
    _strays(store, blobs, findings)
    _verify_references(records, findings)
    total = sum(size for size, _ in blobs.values())
    return Verification(root=store.label, records=len(records), blobs=len(blobs), bytes=total, findings=tuple(findings))


def _verify_records(store: Store, findings: list[Finding]) -> dict[str, Record]:
    """Every record that is whole, by key; what is not becomes a finding."""
    records: dict[str, Record] = {}
    keys = [*store.record_keys(), MARKER]
    for key in keys:
        model = Marker if key == MARKER else MODELS[key.partition("/")[0]]
        try:
            records[key] = decode(store.read_fresh(key) or b"", model, key)
            expected = _key(records[key])
            if expected != key:
                findings.append(Finding(kind="corrupt record", path=key, detail=f"is the record of {expected}"))
        except InputError as error:
            findings.append(Finding(kind="newer record", path=key, detail=str(error)))
        except StoreError as error:
            findings.append(Finding(kind="corrupt record", path=key, detail=str(error)))
    histories: dict[str, set[int]] = {}
    for key in keys:
        folder, _, file = key.rpartition("/")
        if folder.partition("/")[0] in ("refs", "tags") and file.removesuffix(".json").isdecimal():
            histories.setdefault(folder, set()).add(int(file.removesuffix(".json")))
    for folder, numbers in histories.items():
        for number in sorted(set(range(1, max(numbers))) - numbers):
            detail = "a step of this history is gone; restore it from a copy or bundle"
            findings.append(Finding(kind="missing record", path=f"{folder}/{number}.json", detail=detail))
    return records


def _key(record: Record) -> str:
    """Where a record belongs."""
    match record:
        case VectorVersion():
            return f"vectors/{record.name}/{record.version}.json"
        case PresetVersion():
            return f"presets/{record.name}/{record.version}.json"
        case Move():
            return f"refs/{record.subject}/{record.name}/{record.alias}/{record.sequence}.json"
        case Tagging():
            return f"tags/{record.subject}/{record.name}/{record.version}/{record.sequence}.json"
        case Retirement():
            return f"retired/{record.name}/{record.version}.json"
        case Served():
            return f"served/{record.fingerprint[7:]}.json"
    return MARKER


def _verify_references(records: dict[str, Record], findings: list[Finding]) -> None:
    """Presets, served fingerprints, aliases and tags must name versions that exist and are what they were."""
    for key, record in records.items():
        named: dict[str, str] = {}
        if isinstance(record, PresetVersion | Served):
            named = {f"vectors/{ref.replace('@', '/')}.json": digest for ref, digest in record.vectors.items()}
        elif isinstance(record, Move | Tagging | Retirement) and record.version is not None:
            subject = "vectors" if isinstance(record, Retirement) else record.subject
            named = {f"{subject}/{record.name}/{record.version}.json": ""}
        for target, digest in named.items():
            found = records.get(target)
            if found is None:
                detail = f"names {target}, which is missing or damaged"
            elif digest and isinstance(found, VectorVersion) and found.digest != digest:
                detail = f"means {digest}, but {target} is {found.digest}"
            else:
                continue
            findings.append(Finding(kind="dangling reference", path=key, detail=detail))


def _strays(store: Store, blobs: Iterable[str], findings: list[Finding]) -> None:
    known = {digest[7:] for digest in blobs}
    for name in store.children("blobs"):
        if name not in known:
            findings.append(Finding(kind="stray file", path=f"blobs/{name}", detail="not a blob; look and remove it"))
    for path in store.stale_staging():
        detail = "its writer died; `gc` deletes it"
        findings.append(Finding(kind="stale staging", path=f"staging/{path.name}", detail=detail))
    mutable: dict[str, type[Record]] = {CLAIM: Claim} | {f"holds/{name}": Hold for name in store.children("holds")}
    for key, model in mutable.items():
        try:
            data = store.read_fresh(key)
            if data is not None:
                decode(data, model, key)
        except (StoreError, InputError):
            advice = "the next writer replaces it" if key == CLAIM else "until it is released, nothing can be retired"
            findings.append(Finding(kind="corrupt record", path=key, detail=f"cannot be read; {advice}"))


def _hash(store: Store, digest: str) -> str:
    if store.folder is not None:
        return hash_file(store.folder / blob_key(digest))
    hasher = blake3(max_threads=blake3.AUTO)
    for piece in store.read_blob(digest):
        hasher.update(piece)
    return f"blake3:{hasher.hexdigest()}"


def collect(catalog: Catalog, *, apply: bool = False, grace_s: float = 3600.0) -> Collection:
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
        checks.append(_check(usage.free > usage.total // 20, "store space", f"{usage.free / 1e9:.1f} GB free"))
    claim = Lease(store, "doctor").claim()
    writes = claim is not None and not claim.released
    writer = f"{claim.owner} (pid {claim.pid} on {claim.host}) writes" if claim and writes else "nobody writes"
    checks.append(Check(level="ok", what="writer", detail=writer))
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


assert set(MODELS) == set(RECORD_FOLDERS)

"""Maintenance of a store: `verify` finds what is wrong, `collect` (gc) deletes what nobody needs, `repair` marks lost
steps of a history, `check_store` and `check_cache` (doctor) report on store and cache.

`collect` alone deletes. It holds the lease meanwhile and stops where it cannot know what is needed; a publisher whose
staged blob it took stages it again, so that a clock that jumps costs time and no bytes.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import CLAIM, Lease
from prefvec_ray.registry.ledger import NUMBERED
from prefvec_ray.registry.names import VERSION
from prefvec_ray.registry.records import (
    Hold,
    LeaseClaim,
    Move,
    PresetVersion,
    Record,
    Retirement,
    Served,
    Tagging,
    VectorVersion,
    build,
    decode,
    encode,
    key_of,
)
from prefvec_ray.registry.statements import scratch_folder, wrong_statements
from prefvec_ray.registry.store import MARKER, RECORD_FOLDERS, Marker, Store, blob_key, hash_file

if TYPE_CHECKING:
    from prefvec_ray.registry.catalog import Catalog

MODELS: dict[str, type[Record]] = {
    "vectors": VectorVersion,
    "presets": PresetVersion,
    "refs": Move,
    "tags": Tagging,
    "retired": Retirement,
    "served": Served,
}
REPAIR = "mark it as lost with `prefvec registry repair --apply`"
Level = Literal["ok", "warning", "problem"]
Progress = Callable[[str, int], None]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreFinding(Frozen):
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
        "wrong statement",
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
    findings: tuple[StoreFinding, ...]

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

    Every manifest is compared with its vector: preference, form, dtype, base, parents, digest, finite numbers. Changes
    nothing and needs no lease; a version that is published meanwhile may show as an orphan blob. With
    `read_bytes=False` blobs are only measured. `progress(path, bytes)` is called after each blob. In a bucket one
    vector at a time is copied to a scratch folder for that.
    """
    findings: list[StoreFinding] = []
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
            detail = f"{max(users.values())} bytes are gone; publish the original files again to restore it"
            findings.append(StoreFinding(kind="missing blob", path=blob_key(digest), detail=detail, needed_by=live))
    for digest, (size, _) in sorted(blobs.items()):
        expected, live = needed.get(digest, {}), tuple(sorted(needed.get(digest, {}).keys() - retired))
        wrong = None
        if expected and size != max(expected.values()):
            wrong = f"{size} bytes instead of {max(expected.values())}"
        elif read_bytes and _hash(store, digest) != digest:
            wrong = "the bytes changed"
        if wrong:
            detail = f"{wrong}; publish the original files again to restore it"
            findings.append(StoreFinding(kind="corrupt blob", path=blob_key(digest), detail=detail, needed_by=live))
        elif not live:
            detail = f"{size} bytes that nothing refers to; `gc` deletes them"
            findings.append(StoreFinding(kind="orphan blob", path=blob_key(digest), detail=detail))
        progress(blob_key(digest), size)
    if read_bytes:
        _verify_statements(store, records, retired, findings)
    _strays(store, blobs, findings)
    _verify_references(records, findings)
    total = sum(size for size, _ in blobs.values())
    return Verification(root=store.label, records=len(records), blobs=len(blobs), bytes=total, findings=tuple(findings))


def _verify_records(store: Store, findings: list[StoreFinding]) -> dict[str, Record]:
    """Every record that is whole, by key; what is not becomes a finding."""
    records: dict[str, Record] = {}
    keys = [*store.record_keys(), MARKER]
    for key in keys:
        model = Marker if key == MARKER else MODELS[key.partition("/")[0]]
        try:
            records[key] = decode(store.read_fresh(key) or b"", model, key)
            expected = key_of(records[key]) or MARKER
            if expected != key:
                findings.append(StoreFinding(kind="corrupt record", path=key, detail=f"is the record of {expected}"))
        except InputError as error:
            findings.append(StoreFinding(kind="newer record", path=key, detail=str(error)))
        except StoreError as error:
            advice = f"; or {REPAIR}" if key.startswith(("refs/", "tags/")) else ""
            findings.append(StoreFinding(kind="corrupt record", path=key, detail=str(error) + advice))
    histories: dict[str, set[int]] = {}
    for key in keys:
        folder, _, file = key.rpartition("/")
        if folder.partition("/")[0] in ("refs", "tags") and file.removesuffix(".json").isdecimal():
            histories.setdefault(folder, set()).add(int(file.removesuffix(".json")))
    for folder, numbers in histories.items():
        missing = itertools.islice((n for n in range(1, max(numbers)) if n not in numbers), 100)
        for number in missing:
            detail = f"a step of this history is gone; restore it from a copy, or {REPAIR}"
            findings.append(StoreFinding(kind="missing record", path=f"{folder}/{number}.json", detail=detail))
        newest = records.get(f"{folder}/{max(numbers)}.json")
        if isinstance(newest, Move | Tagging) and newest.kind.startswith("lost"):
            detail = "the newest step of this history was lost; set the alias or the tags again"
            findings.append(StoreFinding(kind="missing record", path=folder, detail=detail))
    return records


def _verify_statements(
    store: Store, records: dict[str, Record], retired: set[str], findings: list[StoreFinding]
) -> None:
    """Compare every manifest whose bytes are sound with its vector."""
    damaged = {finding.path for finding in findings if finding.kind in ("corrupt blob", "missing blob")}
    for key, record in records.items():
        if not isinstance(record, VectorVersion) or record.ref in retired:
            continue
        if damaged.isdisjoint(blob_key(file.digest) for file in record.files):
            with _vector_folder(store, record) as folder:
                for wrong in wrong_statements(record, folder, links=True):
                    detail = f"{wrong}; do not use it: retire it, and publish the vector from its own files"
                    findings.append(
                        StoreFinding(kind="wrong statement", path=key, detail=detail, needed_by=(record.ref,))
                    )


@contextlib.contextmanager
def _vector_folder(store: Store, version: VectorVersion) -> Iterator[Path]:
    """The files of a version under their names: links into a folder's blobs, copies of a bucket's."""
    written: dict[str, Path] = {}
    with scratch_folder() as scratch:
        for file in version.files:
            target = scratch / file.name
            if store.folder is not None:
                target.symlink_to((store.folder / blob_key(file.digest)).resolve())
            elif file.digest in written:
                target.symlink_to(written[file.digest])
            else:
                written[file.digest] = target
                with target.open("xb") as out:
                    for piece in store.read_blob(file.digest):
                        out.write(piece)
        yield scratch


def _verify_references(records: dict[str, Record], findings: list[StoreFinding]) -> None:
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
            findings.append(StoreFinding(kind="dangling reference", path=key, detail=detail))


def _strays(store: Store, blobs: Iterable[str], findings: list[StoreFinding]) -> None:
    known = {digest[7:] for digest in blobs}
    for name in store.children("blobs"):
        if name not in known:
            findings.append(
                StoreFinding(kind="stray file", path=f"blobs/{name}", detail="not a blob; inspect and remove it")
            )
    for path in store.stale_staging():
        detail = "its writer died; `gc` deletes it"
        findings.append(StoreFinding(kind="stale staging", path=f"staging/{path.name}", detail=detail))
    mutable: dict[str, type[Record]] = {CLAIM: LeaseClaim} | {f"holds/{name}": Hold for name in store.children("holds")}
    for key, model in mutable.items():
        try:
            data = store.read_fresh(key)
            if data is not None:
                decode(data, model, key)
        except (StoreError, InputError):
            advice = "the next writer replaces it" if key == CLAIM else "until it is released, nothing can be retired"
            findings.append(StoreFinding(kind="corrupt record", path=key, detail=f"cannot be read; {advice}"))


def _hash(store: Store, digest: str) -> str:
    if store.folder is not None:
        return hash_file(store.folder / blob_key(digest))
    hasher = blake3(max_threads=blake3.AUTO)
    for piece in store.read_blob(digest):
        hasher.update(piece)
    return f"blake3:{hasher.hexdigest()}"


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


assert set(MODELS) == set(RECORD_FOLDERS)

"""`verify`: read a whole store, and name everything in it that is not as it should be."""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.blobs import blob_key, hash_file, hash_pieces
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import CLAIM
from prefvec_ray.registry.records import (
    FileEntry,
    Hold,
    LeaseClaim,
    Move,
    PresetVersion,
    Record,
    Retirement,
    Served,
    Tagging,
    VectorVersion,
    decode,
    key_of,
)
from prefvec_ray.registry.statements import scratch_folder, wrong_statements
from prefvec_ray.registry.store import MARKER, RECORD_FOLDERS, Marker, Store

MODELS: dict[str, type[Record]] = {
    "vectors": VectorVersion,
    "presets": PresetVersion,
    "refs": Move,
    "tags": Tagging,
    "retired": Retirement,
    "served": Served,
}
REPAIR = "mark it as lost with `prefvec registry repair --apply`"


Kind = Literal[
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


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreFinding(Frozen):
    """One thing that is not as it should be. `harm`: something that was published is affected."""

    kind: Kind
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


def verify(store: Store, *, read_bytes: bool = True) -> Verification:
    """Read everything and compare: records with their digests, blobs with theirs, references with what they name.

    Every manifest is compared with its vector: preference, form, dtype, base, parents, digest, finite numbers. Each
    blob is read once, several vectors at a time; in a bucket, one vector at a time is copied to a scratch folder.
    Changes nothing and needs no lease; a version that is published meanwhile may show as an orphan blob. With
    `read_bytes=False` blobs are only measured.
    """
    findings: list[StoreFinding] = []
    records = _verify_records(store, findings)
    retired = {f"{r.name}@{r.version}" for r in records.values() if isinstance(r, Retirement)}
    vectors = {key: record for key, record in records.items() if isinstance(record, VectorVersion)}
    live = {key: version for key, version in vectors.items() if version.ref not in retired}
    blobs = store.blobs()
    digests, wrong = _read_blobs(store, blobs, live) if read_bytes else ({}, {})
    sizes = {file.digest: file.size for version in vectors.values() for file in version.files}
    users: dict[str, list[str]] = {}
    for version in live.values():
        for file in version.files:
            users.setdefault(file.digest, []).append(version.ref)
    for digest in [*(digest for digest in users if digest not in blobs), *sorted(blobs)]:
        findings += _verify_blob(digest, blobs, sizes, digests, users)
    damaged = {finding.path for finding in findings if finding.kind in ("corrupt blob", "missing blob")}
    for key, statements in wrong.items():
        if damaged.isdisjoint(blob_key(file.digest) for file in live[key].files):
            for statement in statements:
                detail = f"{statement}; do not use it: retire it, and publish the vector from its own files"
                needed_by = (live[key].ref,)
                findings.append(StoreFinding(kind="wrong statement", path=key, detail=detail, needed_by=needed_by))
    _strays(store, blobs, findings)
    _verify_references(records, findings)
    total = sum(size for size, _ in blobs.values())
    return Verification(root=store.label, records=len(records), blobs=len(blobs), bytes=total, findings=tuple(findings))


def _verify_blob(
    digest: str,
    blobs: Mapping[str, tuple[int, float]],
    sizes: Mapping[str, int],
    digests: Mapping[str, str],
    users: Mapping[str, Sequence[str]],
) -> Iterator[StoreFinding]:
    """What is wrong with one blob: `sizes` are those of the manifests, `digests` those of the bytes as they are now."""
    needed_by = tuple(sorted(set(users.get(digest, ()))))
    size = blobs[digest][0] if digest in blobs else None
    wrong = None
    if size is None:
        wrong = f"{sizes[digest]} bytes are gone"
    elif sizes.get(digest, size) != size:
        wrong = f"{size} bytes instead of {sizes[digest]}"
    elif digests.get(digest, digest) != digest:
        wrong = "the bytes changed"
    if wrong:
        kind: Kind = "missing blob" if size is None else "corrupt blob"
        detail = f"{wrong}; publish the original files again to restore it"
        yield StoreFinding(kind=kind, path=blob_key(digest), detail=detail, needed_by=needed_by)
    elif not needed_by:
        detail = f"{size} bytes that nothing refers to; `gc` deletes them"
        yield StoreFinding(kind="orphan blob", path=blob_key(digest), detail=detail)


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


def _read_blobs(
    store: Store, blobs: Mapping[str, tuple[int, float]], live: Mapping[str, VectorVersion]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The digest of every blob as its bytes are now, and what is wrong with each manifest in `live`.

    Manifests whose blobs are missing or of another size are left out. Each blob is read once, unless vectors share it.
    """
    of_files: dict[tuple[FileEntry, ...], dict[str, VectorVersion]] = {}
    for key, version in live.items():
        if all(blobs.get(file.digest, (None,))[0] == file.size for file in version.files):
            of_files.setdefault(version.files, {})[key] = version
    digests: dict[str, str] = {}
    wrong: dict[str, list[str]] = {}
    with ThreadPoolExecutor(1 if store.folder is None else os.cpu_count()) as pool:
        for found, statements in pool.map(functools.partial(_read_vector, store), of_files.values()):
            digests |= found
            wrong |= statements
        others = sorted(blobs.keys() - digests.keys())
        digests |= zip(others, pool.map(functools.partial(_hash, store), others), strict=True)
    return digests, wrong


def _read_vector(store: Store, versions: Mapping[str, VectorVersion]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`_read_blobs` for versions that have the same files."""
    from prefvec_ray.vectors import load_vector

    files = next(iter(versions.values())).files
    hashers: dict[str, blake3] = {}
    with _vector_folder(store, files) as folder:

        @functools.cache
        def digest() -> str:
            hashers.clear()
            hashers.update({file.name: blake3(max_threads=blake3.AUTO) for file in files})
            return load_vector(folder, links=True).validated_digest(lambda name, piece: hashers[name].update(piece))

        wrong = {key: wrong_statements(v, folder, links=True, digest=digest) for key, v in versions.items()}
        found = {}
        for file in files:
            found[file.digest] = f"blake3:{hashers[file.name].hexdigest()}" if hashers else ""
            if found[file.digest] != file.digest:  # damaged, or not read to its end, or no part of the vector itself
                found[file.digest] = hash_file(folder / file.name)
    return found, wrong


@contextlib.contextmanager
def _vector_folder(store: Store, files: Iterable[FileEntry]) -> Iterator[Path]:
    """The files of a version under their names: links into a folder's blobs, copies of a bucket's."""
    written: dict[str, Path] = {}
    with scratch_folder() as scratch:
        for file in files:
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
    return hash_pieces(store.read_blob(digest))


assert set(MODELS) == set(RECORD_FOLDERS)

"""A bundle: published vectors and presets as one file, for another registry.

A bundle is an uncompressed tar of plain files: `bundle.json` first, a record that holds the manifests of vectors and
presets, then their blobs as `blobs/<hex>`. Aliases and tags stay behind: they are decisions of one registry.

Reading trusts nothing. The index says what the file must hold; a shorter file is refused before anything is written.
Members are read by the offsets of their headers, and anything but a plain file (links, sparse files, extended headers)
is refused. Every blob is hashed, and every manifest is compared with its vector, before the registry gets the first
byte. Files are unpacked in a scratch folder only: a bundle chooses no place to write to.
"""

import contextlib
import io
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from prefvec_ray.common.atomic import new_file
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.blobs import CHUNK, blob_key, hash_pieces
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.names import LARGEST_CHOSEN_VERSION, check_case, shown
from prefvec_ray.registry.records import (
    LARGEST_RECORD,
    PresetVersion,
    Record,
    VectorDraft,
    VectorVersion,
    build,
    decode,
    encode,
)
from prefvec_ray.registry.statements import scratch_folder, wrong_statements

if TYPE_CHECKING:
    from prefvec_ray.registry.registry import Registry

INDEX = "bundle.json"
BLOCK = tarfile.BLOCKSIZE


class BundleIndex(Record):
    """What a bundle holds: whole manifests, as their registry wrote them."""

    vectors: Annotated[tuple[VectorVersion, ...], Field(min_length=1)]
    presets: tuple[PresetVersion, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """Every reference once, every blob of one size, every preset with the vectors that it was made with."""
        carried = {version.ref: version for version in self.vectors}
        if len(carried) < len(self.vectors) or len({preset.ref for preset in self.presets}) < len(self.presets):
            raise InputError("names one version twice; export it again")
        sizes: dict[str, int] = {}
        for file in (file for version in self.vectors for file in version.files):
            if sizes.setdefault(file.digest, file.size) != file.size:
                raise InputError(f"gives {file.digest} two sizes; export it again")
        for name in {version.name for version in self.vectors}:
            check_case(name, {version.name for version in self.vectors})
        for preset in self.presets:
            for ref, digest in preset.vectors.items():
                vector = carried.get(ref)
                if vector is None or (vector.digest, vector.base_fingerprint) != (digest, preset.base_fingerprint):
                    raise InputError(f"preset {preset.ref} needs {ref}, which the bundle does not carry")
        return self

    @property
    def blobs(self) -> dict[str, int]:
        """digest -> size of every blob that the bundle must hold."""
        return {file.digest: file.size for version in self.vectors for file in version.files}


def export_bundle(registry: "Registry", out: str | Path, vectors: Iterable[str], presets: Iterable[str]) -> Path:
    """Write the named versions, and those that the presets need, to the new file `out`, whole or not at all."""
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name or remove it")
    chosen_presets = {preset.ref: preset for preset in map(registry.resolve_preset, presets)}
    needed = [*vectors, *(ref for preset in chosen_presets.values() for ref in preset.vectors)]
    chosen = {version.ref: version for version in map(registry.resolve, needed)}
    if not chosen:
        raise InputError(f"{out}: nothing to export; name at least one vector or preset")
    ordered = sorted(chosen.values(), key=lambda version: (version.name, version.version))
    index = encode(BundleIndex(created=time.time(), vectors=tuple(ordered), presets=tuple(chosen_presets.values())))
    files = {file.digest: (version, file) for version in ordered for file in version.files}
    if len(index) > LARGEST_RECORD:
        raise InputError(f"{out}: {len(chosen)} versions are too many for one bundle; export fewer at a time")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_file(out) as temporary,
        tarfile.open(temporary, "w:", format=tarfile.GNU_FORMAT) as tar,  # no extended headers, whatever the size
    ):
        _add(tar, INDEX, len(index), io.BytesIO(index))
        for digest, (version, file) in files.items():
            with registry.fetched(version) as folder, (folder / file.name).open("rb") as source:
                _add(tar, blob_key(digest), file.size, source)
    return out


def import_bundle(registry: "Registry", path: str | Path, *, renumber: bool = False) -> dict[str, str]:
    """Publish what a bundle holds; returns its references and what they are called here.

    Versions keep their numbers. One that is taken here by something else is refused, before anything is published,
    unless `renumber` lets it take the next number; presets then follow. What is already here is not published again.
    Raises InputError, and writes nothing to the registry, for a bundle that is cut, changed or of a newer release, that
    holds anything but what its index promises, or whose manifests contradict their vectors.
    """
    path = Path(path)
    with _open(path) as file:
        index, members = _read_index(file, path)
        plan = _plan(registry, index, renumber, path)
        _check_members(file, index, members, path)
        with scratch_folder() as scratch:
            for version in index.vectors:
                with _files(file, version, members, scratch) as folder:
                    if wrong := wrong_statements(version, folder):
                        raise InputError(f"{path}: {version.ref}: {wrong[0]}; ask the publisher for a sound bundle")
            for version in index.vectors:
                with _files(file, version, members, scratch) as folder:
                    for entry in version.files:
                        if registry.blobs.stage(folder / entry.name, lambda: None) != (entry.digest, entry.size):
                            raise StoreError(f"{path}: changed while it was imported; nothing was published")
    return _publish(registry, index, plan)


def _publish(registry: "Registry", index: BundleIndex, plan: dict[str, int | None]) -> dict[str, str]:
    renamed = {}
    for version in index.vectors:
        draft = build(VectorDraft, **version.model_dump(include=set(VectorDraft.model_fields)))
        here = registry.commit_vector(draft, version=plan[version.ref], creator=version.creator, like=version)
        renamed[version.ref] = here.ref
    for preset in index.presets:
        etas = {renamed[ref]: eta for ref, eta in preset.coefficients.items()}
        here_preset = registry.publish_preset(
            preset.name, etas, metrics=preset.metrics, reason=preset.reason, creator=preset.creator
        )
        renamed[f"preset:{preset.ref}"] = f"preset:{here_preset.ref}"
    return renamed


def _known(registry: "Registry", version: VectorVersion) -> int | None:
    """The number under which this very version is here already. A damaged version here is another one."""
    for number in reversed(registry.versions(version.name)):
        with contextlib.suppress(StoreError):
            if registry.resolve(f"{version.name}@{number}").content == version.content:
                return number
    return None


def _plan(registry: "Registry", index: BundleIndex, renumber: bool, path: Path) -> dict[str, int | None]:
    """The number that each version asks for here; InputError where one is taken by other content, or too large."""
    names = registry.names()
    for version in index.vectors:
        check_case(version.name, names)
    plan: dict[str, int | None] = {}
    newest: dict[str, float] = {name: max(numbers) for name in names if (numbers := registry.versions(name))}
    for version in index.vectors:
        known = _known(registry, version)
        if known:
            plan[version.ref] = known
        elif newest.get(version.name, 0) < version.version <= LARGEST_CHOSEN_VERSION:
            plan[version.ref] = newest[version.name] = version.version
        elif renumber:
            plan[version.ref], newest[version.name] = None, math.inf  # later versions of this name follow it
        elif version.version > LARGEST_CHOSEN_VERSION:
            raise InputError(
                f"{path}: {version.ref}: a number beyond {LARGEST_CHOSEN_VERSION} leaves the name without free numbers;"
                " import with renumber to give it the next number"
            )
        else:
            raise InputError(
                f"{path}: {version.ref} is taken here by other content; import with renumber to give it the next number"
            )
    return plan


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A bundle as a plain file; InputError for whatever cannot be read as one."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no plain file; give the bundle that `prefvec registry export` wrote")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a bundle") from None
    with file:
        yield file


def _members(file: IO[bytes], path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every member of a tar of plain files. InputError for any other member or a cut file."""
    end, offset = os.fstat(file.fileno()).st_size, 0
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if header == b"\0" * BLOCK:
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise InputError(f"{path}: not a bundle, or cut short ({error}); copy it again") from None
        if member.type != tarfile.REGTYPE or member.linkname or member.size < 0:
            raise InputError(f"{path}: {shown(member.name)} is no plain file; export the bundle again")
        if offset + BLOCK + member.size > end:
            raise InputError(f"{path}: is cut short in {shown(member.name)}; copy it again")
        yield member.name, offset + BLOCK, member.size
        offset += BLOCK + -(-member.size // BLOCK) * BLOCK


def _read_index(file: IO[bytes], path: Path) -> tuple[BundleIndex, dict[str, tuple[int, int]]]:
    """The index, and (offset, size) of every blob by digest."""
    members = _members(file, path)
    name, offset, size = next(members, ("", 0, 0))
    if name != INDEX or size > LARGEST_RECORD:
        raise InputError(f"{path}: not a bundle (it does not begin with {INDEX})")
    file.seek(offset)
    try:
        index = decode(file.read(size), BundleIndex, f"{path}:{INDEX}")
    except StoreError as error:
        raise InputError(str(error)) from None
    missing = {blob_key(digest): digest for digest in index.blobs}
    if os.fstat(file.fileno()).st_size < sum(index.blobs.values()):
        raise InputError(f"{path}: is smaller than the files that its index promises; copy it again")
    found = {}
    for name, offset, size in members:
        digest = missing.pop(name, None)
        if digest is None or size != index.blobs[digest]:
            raise InputError(f"{path}: holds {shown(name)}, which its index does not promise; copy the bundle again")
        found[digest] = (offset, size)
    if missing:
        raise InputError(f"{path}: is cut short, {len(missing)} files are missing; copy it again")
    return index, found


def _check_members(file: IO[bytes], index: BundleIndex, members: dict[str, tuple[int, int]], path: Path) -> None:
    """Hash every blob where it lies."""
    for digest, (offset, size) in members.items():
        if hash_pieces(_pieces(file, offset, size)) != digest:
            raise InputError(f"{path}: {blob_key(digest)} has other bytes than its name says; copy it again")


def _pieces(file: IO[bytes], offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    while size > 0 and (piece := file.read(min(CHUNK, size))):
        yield piece
        size -= len(piece)


@contextlib.contextmanager
def _files(
    file: IO[bytes], version: VectorVersion, members: dict[str, tuple[int, int]], scratch: Path
) -> Iterator[Path]:
    """The files of one version in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        written: dict[str, Path] = {}
        for entry in version.files:
            target = Path(folder) / entry.name
            if entry.digest in written:  # the same bytes under many names take their room once
                os.link(written[entry.digest], target)
                continue
            written[entry.digest] = target
            with target.open("xb") as out:
                for piece in _pieces(file, *members[entry.digest]):
                    out.write(piece)
        yield Path(folder)


def _add(tar: tarfile.TarFile, name: str, size: int, source: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, source)

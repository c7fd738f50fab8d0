"""Taking published vectors elsewhere: a bundle (one file, into another registry) and a Hugging Face folder.

A bundle is an uncompressed tar: `bundle.json` first, a record that holds the manifests of vectors and presets, then
their blobs. Aliases and tags stay behind: they are decisions of one registry. Reading trusts nothing: names must be
those that the index promises, every blob must have its digest, and nothing is extracted by the tar's own paths.
"""

import contextlib
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefvec_ray.errors import InputError
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.records import (
    FileEntry,
    PresetVersion,
    Record,
    VectorDraft,
    VectorVersion,
    decode,
    encode,
)
from prefvec_ray.registry.store import CHUNK, blob_key, hash_file

if TYPE_CHECKING:
    from prefvec_ray.registry.registry import Registry

INDEX = "bundle.json"
LARGEST_INDEX = 1 << 30


class BundleIndex(Record):
    """What a bundle holds: whole manifests, as their registry wrote them."""

    vectors: tuple[VectorVersion, ...]
    presets: tuple[PresetVersion, ...] = ()


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
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        with tarfile.open(temporary, "w:") as tar:
            _add(tar, INDEX, len(index), io.BytesIO(index))
            for digest, (version, file) in files.items():
                with (registry.fetch(version.ref) / file.name).open("rb") as source:
                    _add(tar, blob_key(digest), file.size, source)
                registry.cache.unpin(version)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def import_bundle(registry: "Registry", path: str | Path, *, renumber: bool = False) -> dict[str, str]:
    """Publish what a bundle holds; returns its references and what they are called here.

    Versions keep their numbers. One that is taken here by something else is refused, before anything is published,
    unless `renumber` lets it take the next number; presets then follow. What is already here is not published again.
    Raises InputError for a bundle that is cut, changed or of a newer release.
    """
    path = Path(path)
    with _reading(path), tarfile.open(path, "r:") as tar, tempfile.TemporaryDirectory() as scratch:
        index = _read_index(tar, path)
        plan = _plan(registry, index, renumber, path)
        expected = {file.digest: file for version in index.vectors for file in version.files}
        for digest, file in _blobs(tar, expected, Path(scratch), path):
            found, _ = registry.blobs.stage(file, lambda: None)
            if found != digest:
                raise InputError(f"{path}: {blob_key(digest)} has other bytes than its name says; copy it again")
            file.unlink()
    renamed = {}
    for version in index.vectors:
        draft = VectorDraft(**version.model_dump(include=set(VectorDraft.model_fields)))
        here = registry.commit_vector(draft, version=plan[version.ref], creator=version.creator, like=version)
        renamed[version.ref] = here.ref
    for preset in index.presets:
        etas = {renamed[ref]: eta for ref, eta in preset.coefficients.items()}
        here_preset = registry.publish_preset(
            preset.name, etas, metrics=preset.metrics, reason=preset.reason, creator=preset.creator
        )
        renamed[f"preset:{preset.ref}"] = f"preset:{here_preset.ref}"
    return renamed


def _plan(registry: "Registry", index: BundleIndex, renumber: bool, path: Path) -> dict[str, int | None]:
    """The number that each version asks for here; InputError where one is taken by other content."""
    plan: dict[str, int | None] = {}
    newest: dict[str, float] = {name: max(numbers) for name in registry.names() if (numbers := registry.versions(name))}
    for version in index.vectors:
        known = [
            v
            for v in registry.versions(version.name)
            if registry.resolve(f"{version.name}@{v}").content == version.content
        ]
        if known:
            plan[version.ref] = known[-1]
        elif version.version > newest.get(version.name, 0):
            plan[version.ref] = newest[version.name] = version.version
        elif renumber:
            plan[version.ref], newest[version.name] = None, math.inf  # later versions of this name follow it
        else:
            raise InputError(
                f"{path}: {version.ref} is taken here by other content; import with renumber to give it the next number"
            )
    return plan


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a bundle, or cut short ({error}); copy it again") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file") from None


def _read_index(tar: tarfile.TarFile, path: Path) -> BundleIndex:
    first = tar.next()
    if first is None or first.name != INDEX or not first.isreg() or first.size > LARGEST_INDEX:
        raise InputError(f"{path}: not a bundle (it does not begin with {INDEX})")
    stream = tar.extractfile(first)
    assert stream is not None
    try:
        index = decode(stream.read(), BundleIndex, f"{path}:{INDEX}")
    except StoreError as error:
        raise InputError(str(error)) from None
    carried = {version.ref: version for version in index.vectors}
    for preset in index.presets:
        for ref, digest in preset.vectors.items():
            if ref not in carried or carried[ref].digest != digest:
                raise InputError(f"{path}: preset {preset.ref} needs {ref}, which the bundle does not carry")
    return index


def _blobs(
    tar: tarfile.TarFile, expected: dict[str, FileEntry], scratch: Path, path: Path
) -> Iterator[tuple[str, Path]]:
    """Each promised blob as a scratch file; InputError where one is missing, strange or cut."""
    missing = {blob_key(digest): digest for digest in expected}
    while member := tar.next():
        digest = missing.pop(member.name, None)
        if digest is None or not member.isreg() or member.size != expected[digest].size:
            raise InputError(f"{path}: holds {member.name!r}, which its index does not promise; copy the bundle again")
        stream = tar.extractfile(member)
        assert stream is not None
        target = scratch / digest[7:]
        with target.open("xb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
        if target.stat().st_size != member.size:
            raise InputError(f"{path}: is cut short in {member.name}; copy it again")
        yield digest, target
    if missing:
        raise InputError(f"{path}: is cut short, {len(missing)} files are missing; copy it again")


def _add(tar: tarfile.TarFile, name: str, size: int, source: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, source)


def export_huggingface(registry: "Registry", ref: str, out: str | Path, *, base_model: str | None = None) -> Path:
    """A folder that `huggingface_hub` can push: the vector's files, a model card, the manifest as `prefvec.json`.

    `base_model` is the base's name on the hub, which a fingerprint does not tell. `publish_vector` takes the folder
    back.
    """
    version, out = registry.resolve(ref), Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; choose a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = registry.fetch(version.ref)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        inside = Path(scratch) / "folder"
        inside.mkdir()
        for file in version.files:
            shutil.copyfile(folder / file.name, inside / file.name)
            if hash_file(inside / file.name) != file.digest:
                raise StoreError(f"{version.ref}: {file.name} changed while it was copied; try again")
        manifest = version.model_dump(mode="json")
        (inside / "prefvec.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
        if not (inside / "README.md").exists():
            (inside / "README.md").write_text(_card(registry, version, base_model), "utf-8")
        inside.replace(out)
    registry.cache.unpin(version)
    return out


def _card(registry: "Registry", version: VectorVersion, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=version.license or None,
        library_name="prefvec-ray",
        base_model=base_model,
        tags=["preference-vector", "task-arithmetic", "alignment"],
    )
    rows = {
        "preference": version.preference,
        "published as": version.ref,
        "form": f"{version.form}, {version.dtype}" + (f", rank {version.rank}" if version.rank else ""),
        "digest": f"`{version.digest}`",
        "base fingerprint": f"`{version.base_fingerprint}`",
        "data digest": f"`{version.data_digest}`" if version.data_digest else "not stated",
        **{f"{polarity} run": f"`{digest}`" for polarity, digest in version.parents.items()},
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    facts = {"Recipe": version.recipe, "Metrics": version.metrics, "Precision": version.precision}
    sections = [
        f"## {heading}\n\n```json\n{json.dumps(values, indent=1, sort_keys=True)}\n```"
        for heading, values in facts.items()
        if values
    ]
    notes = [f"## Notes\n\n{version.notes}"] if version.notes else []
    graph = f"## Lineage\n\n```mermaid\n{registry.lineage(version.ref).to_mermaid()}\n```"
    intro = (
        "A preference vector (Liang et al., arXiv 2504.20106): the difference of two models that were trained for and"
        " against a preference. Add it to its base model, times a coefficient of your choice:"
    )
    code = (
        "```python\nfrom prefvec_ray.vectors import LiveModel, load_vector\n\n"
        f'live = LiveModel(model, {{"{version.preference}": load_vector("this-folder")}})\n'
        f'live.set_coefficients({{"{version.preference}": 0.7}})\n```'
    )
    head = f"---\n{data.to_yaml()}\n---\n\n# {version.preference}"
    return "\n\n".join([head, intro, code, f"| | |\n|---|---|\n{table}", *sections, *notes, graph]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

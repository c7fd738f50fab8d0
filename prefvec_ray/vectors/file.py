"""The preference vector and its file: what `docs/vector-format.md` describes.

    vector = load_vector("vectors/helpful")
    vector.info.preference, vector.names(), vector.dense("model.norm.weight")
    save_vector(vector, "copies/helpful")

A vector is `phi = theta_+ - theta_-` (Preference Vectors, arXiv 2504.20106, section 3): one entry per parameter that
changed, named as in the base checkpoint's files. A training run's own delta `theta_run - theta_base` is the same thing.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from prefvec_ray.common.atomic import new_file
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import parse_json
from prefvec_ray.common.names import DeltaName
from prefvec_ray.common.text import printable
from prefvec_ray.vectors.entries import Entry, Form, Full, from_parts, is_finite
from prefvec_ray.vectors.numbers import read_tensor
from prefvec_ray.vectors.shards import Shards

FORMAT_VERSION = 1
STEM = "vector"
Seen = Callable[[str, memoryview], object]
"""called with all bytes of a vector's files, in the order of each file: (name of the file, bytes)"""
CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8"}


class VectorInfo(BaseModel):
    """What a vector says about itself, kept in the `__metadata__` of every shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    preference: DeltaName
    """the preference's name; a run's delta carries its polarity: `helpful+`"""
    form: Form
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    base_fingerprint: str
    parents: dict[str, str] = {}
    """polarity -> digest of the delta that this vector was taken from"""
    data_digest: str = ""
    recipe: dict[str, JsonValue] = {}
    precision: dict[str, JsonValue] = {}
    """what the extraction and the conversions measured, see `prefvec_ray.vectors.precision`"""


class PreferenceVector:
    """phi: parameter name -> `Full`, `Int8` or `LowRank` entry; entries may be memory-mapped and are read-only.

    `names()` are the parameters that change, sorted; a parameter that is absent has phi = 0. Raises InputError where
    the entries disagree with `info.form` or `info.dtype`.
    """

    def __init__(self, info: VectorInfo, entries: Mapping[str, Entry], *, path: Path | None = None):
        self.info = info
        self.entries = entries
        self.path = path
        if path is None:  # entries from a file are checked from their headers, without reading them
            for name, entry in entries.items():
                parts = entry.parts().items()
                _check_parts(info, name, {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in parts}, "new")

    def __repr__(self) -> str:
        info = self.info
        return f"<PreferenceVector {info.preference}: {len(self.entries)} entries, {info.form}, {info.dtype}>"

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"vector '{self.info.preference}' does not change '{name}'; see names()")
        return self.entries[name]

    def shape(self, name: str) -> torch.Size:
        """The parameter's shape."""
        return self.entry(name).shape

    def dense(self, name: str) -> Tensor:
        """phi of one parameter: fp32, in the parameter's shape, the caller's own copy."""
        entry = self.entry(name)
        return entry.dense().clone() if isinstance(entry, Full) else entry.dense()

    def validate(self) -> "PreferenceVector":
        """Read every number once; InputError names the first entry with NaN or infinity. Returns self."""
        for name in self.names():
            if not is_finite(self.entries[name]):
                raise self._not_finite(name)
        return self

    def digest(self) -> str:
        """`blake3:<hex>` of the base fingerprint and of all numbers: independent of sharding, lineage and name."""
        return self._digest(check=False)

    def validated_digest(self, seen: Seen | None = None) -> str:
        """`digest()` and `validate()` in one pass over the numbers.

        `seen` gets the bytes of the vector's files, where it has any.
        """
        return self._digest(check=True, seen=seen)

    def _digest(self, *, check: bool, seen: Seen | None = None) -> str:
        digests, entries = {}, self.entries
        if isinstance(entries, _FileEntries):
            tensors = entries.in_order(seen)
        else:
            tensors = ((name, part, t, None) for name, entry in entries.items() for part, t in entry.parts().items())
        for name, part, tensor, here in tensors:
            digests[name, part], finite = read_tensor(tensor, check=check, seen=here)
            if not finite:
                raise self._not_finite(name)
        whole = blake3(f"prefvec vector 1\n{self.info.base_fingerprint}\n".encode())
        for (name, part), digest in sorted(digests.items()):
            whole.update(json.dumps([name, part, digest]).encode())
        return f"blake3:{whole.hexdigest()}"

    def _not_finite(self, name: str) -> InputError:
        where = f"vector '{printable(self.info.preference)}': '{printable(name)}'"
        return InputError(f"{where} holds NaN or infinity; extract it again")

    def replace(self, entries: Mapping[str, Entry] | None = None, **changes: Any) -> "PreferenceVector":
        """The same vector with other entries and/or other fields of `info`."""
        info = VectorInfo.model_validate(self.info.model_dump() | changes)
        return PreferenceVector(info, self.entries if entries is None else entries)


def save_vector(vector: PreferenceVector, folder: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Write `vector*.safetensors` (and an index if there are several) into `folder`, and return the folder.

    Every file is written under a temporary name, synced and renamed; the index comes last, so a folder that was
    interrupted never loads. A folder that already holds a vector is refused: a vector's content never changes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / f"{STEM}.safetensors.index.json"
    if index.exists() or (folder / f"{STEM}.safetensors").exists():
        raise InputError(f"{folder}: already holds a vector, and a vector never changes; choose a new folder")
    tensors = {
        stored: tensor
        for name in vector.names()
        for stored, tensor in _stored_parts(vector.info, name, vector.entries[name])
    }
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    metadata = to_metadata(vector.info)
    for file_name, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        with new_file(folder / file_name) as temporary:
            save_file(shard, temporary, metadata)
            replace_metadata(temporary, metadata)
    if split.is_sharded:
        text = json.dumps(
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=1, sort_keys=True
        )
        with new_file(index) as temporary:
            temporary.write_text(text, "utf-8")
            temporary.chmod(0o644)
    return folder


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write `__metadata__` of a safetensors file in place; blanks fill its header up to where the numbers begin.

    safetensors writes it in an order of chance. In order of its keys, equal vectors are equal files, and a store that
    knows files by their bytes knows a vector again.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise AssertionError(f"the header of {path} grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))
    path.chmod(0o644)


def load_vector(path: str | Path, *, links: bool = False) -> PreferenceVector:
    """Open a vector folder or a single `.safetensors` file, memory-mapped: headers are read and checked, numbers are
    not.

    Raises InputError for files that are truncated, tampered with, of a newer format version, sharded inconsistently, or
    whose entries disagree with their stated form. Call `.validate()` to also look for NaN and infinity. `links` allows
    symbolic links to files outside the folder.
    """
    shards = Shards(path, stem=STEM, links=links)
    per_file = shards.metadata()
    first, *others = per_file.values()
    if any(other != first for other in others):
        raise InputError(f"{path}: the shards carry different metadata, they are not of one vector; copy it again")
    info = _from_metadata(first, str(path))
    parts: dict[str, dict[str, str]] = {}
    for stored in shards:
        name, _, part = stored.rpartition(".") if _suffixed(info) else (stored, "", "full")
        parts.setdefault(name, {})[part] = stored
    for name, present in parts.items():
        described = {part: shards.shape_dtype(stored) for part, stored in present.items()}
        _check_parts(
            info, name, {k: (shape, CODES.get(code, code)) for k, (shape, code) in described.items()}, str(path)
        )
        on_meta = {k: torch.empty(shape, device="meta") for k, (shape, _) in described.items()}
        if from_parts(on_meta) is None:
            raise InputError(
                f"{path}: the parts of '{printable(name)}' do not fit together: {described}; extract it again"
            )
    return PreferenceVector(info, _FileEntries(shards, parts), path=Path(path))


class _FileEntries(Mapping[str, Entry]):
    """Entries of an open file, made when asked for."""

    def __init__(self, shards: Shards, parts: dict[str, dict[str, str]]):
        self._shards, self._parts = shards, parts

    def in_order(self, seen: Seen | None) -> Iterator[tuple[str, str, Tensor, Callable[[memoryview], object] | None]]:
        """(name, part, tensor, `seen` of its file) as they lie in the files. `seen` gets each header before them."""
        places = {stored: (name, part) for name, parts in self._parts.items() for part, stored in parts.items()}
        for file, header, names in self._shards.contents():
            here = functools.partial(seen, file) if seen else None
            if here:
                here(memoryview(header))
            yield from ((*places[stored], self._shards.tensor(stored), here) for stored in names)

    def __getitem__(self, name: str) -> Entry:
        entry = from_parts({part: self._shards.tensor(stored) for part, stored in self._parts[name].items()})
        assert entry is not None, "load_vector has checked the headers"
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _suffixed(info: VectorInfo) -> bool:
    """In a plain full vector an entry is stored under the parameter's own name; otherwise a suffix tells the part. So a
    parameter that is really called `foo.A` can never be taken for a factor.
    """
    return info.form == "low-rank" or info.dtype == "int8"


def _stored_name(info: VectorInfo, name: str, part: str) -> str:
    return f"{name}.{part}" if _suffixed(info) else name


def _stored_parts(info: VectorInfo, name: str, entry: Entry) -> list[tuple[str, Tensor]]:
    return [(_stored_name(info, name, part), tensor) for part, tensor in entry.parts().items()]


def _check_parts(info: VectorInfo, name: str, parts: Mapping[str, tuple[tuple[int, ...], str]], where: str) -> None:
    """Which parts (shape, dtype) may an entry have under this form?"""
    dtypes = {part: dtype for part, (_, dtype) in parts.items()}
    allowed = [{"full": str(info.dtype)}]
    if info.form == "low-rank":
        allowed.append({"A": info.dtype, "B": info.dtype})
    if info.dtype == "int8":
        small = "full" in parts and len(parts["full"][0]) < 2
        allowed = [{"full": "float32"}] if small else [{"int8": "int8", "scale": "float32"}]
    if dtypes not in allowed or (info.form == "low-rank" and info.dtype == "int8"):
        raise InputError(
            f"vector '{printable(info.preference)}' ({where}): entry '{printable(name)}' has parts {dtypes}, which"
            f" is not {info.form} form in {info.dtype}; extract or convert it again"
        )


def to_metadata(info: VectorInfo) -> dict[str, str]:
    """The `__metadata__` of every shard: strings as they are, everything else as JSON."""
    fields = info.model_dump(mode="json")
    return {"format": "prefvec"} | {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in fields.items()
    }


def _from_metadata(metadata: dict[str, str], where: str) -> VectorInfo:
    if metadata.get("format") != "prefvec":
        raise InputError(f"{where}: a safetensors file, but not a preference vector (no prefvec metadata)")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise InputError(f"{where}: vector format version '{version}', this release reads {FORMAT_VERSION}; upgrade it")
    fields: dict[str, Any] = {key: value for key, value in metadata.items() if key != "format"}
    try:
        for key in ("format_version", "parents", "recipe", "precision"):
            fields[key] = parse_json(fields[key], f"its {key}", "extract it again")
        return VectorInfo.model_validate(fields)
    except (KeyError, ValueError, ValidationError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{where}: the vector's metadata cannot be read ({reason}); extract it again") from None

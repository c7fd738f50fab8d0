"""The store's records: small immutable JSON objects, each with its own digest.

A record is one line, `{"blake3": <digest of the record's canonical JSON>, "record": {...}}`. Reading compares the whole
line with what writing would have produced, so one flipped bit is found at the first read.

A digest does not prove who wrote a record: a bundle or a copied store may hold any. So the types of the fields carry
the rules (names, file names, versions, sizes, times, finite numbers), and every record is checked when it is read.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from blake3 import blake3
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    model_validator,
)

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.names import (
    LARGEST_VERSION,
    check_file_name,
    check_label,
    check_line,
    check_name,
    check_text,
    parse_pinned,
    shown,
)

FORMAT = 1
LARGEST_RECORD = 64 << 20
"""bytes of a record, or of the index of a bundle; a manifest takes about two kilobytes"""
LARGEST_JSON = 1 << 20
"""bytes of a recipe, of the metrics, or of what was measured, as JSON"""
DEEPEST_JSON = 32
LAST_SECOND = 253_402_300_799
"""of the year 9999: what a calendar can show"""


def _check_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Finite, not deep, not long. InputError names the first value that is not."""
    for path, item in _items(value, ""):
        if path.count("/") > DEEPEST_JSON:
            raise InputError(f"{shown(path)}: nested more than {DEEPEST_JSON} deep; flatten it")
        if isinstance(item, float) and not math.isfinite(item):
            raise InputError(f"{shown(path)}: {item} is not a finite number")
        if isinstance(item, int) and abs(item) >= 2**63:
            raise InputError(f"{shown(path)}: an integer of more than 64 bits; write it as text")
    if len(canonical(value)) > LARGEST_JSON:
        raise InputError(f"more than {LARGEST_JSON} bytes of JSON; keep it in a file of its own")
    return value


def _items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value inside, with its path. Goes one level below the deepest that is allowed, and no further."""
    yield path, value
    if path.count("/") > DEEPEST_JSON:
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from _items(item, f"{path}/{str(key).replace('/', '~')}")


def _check_ref(ref: str) -> str:
    if str(parse_pinned(ref)) != ref:
        raise InputError(f"{shown(ref)}: expected a pinned version such as 'helpful@1'")
    return ref


def _checked(check: Any, *args: Any) -> AfterValidator:
    return AfterValidator(lambda value: check(value, *args))


Digest = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]
Name = Annotated[str, _checked(check_name)]
FileName = Annotated[str, _checked(check_file_name)]
Label = Annotated[str, _checked(check_label, "label")]
PinnedRef = Annotated[str, _checked(_check_ref)]
Version = Annotated[int, Field(strict=True, ge=1, le=LARGEST_VERSION)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Size = Annotated[int, Field(strict=True, ge=0, le=2**50)]
Seconds = Annotated[FiniteFloat, Field(ge=0, le=LAST_SECOND)]
Line = Annotated[str, _checked(check_line, "text")]
Reason = Annotated[str, _checked(check_text, "reason")]
TagValue = Annotated[str, _checked(check_text, "tag", 200)]
Notes = Annotated[str, AfterValidator(lambda value: value and check_text(value, "notes", 20_000))]
Eta = Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)]
StatedDigest = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:+/-]{0,199})?$")]
"""what a publisher calls the digest of data or of a run: a token that is compared and never computed here"""
Json = Annotated[dict[str, JsonValue], AfterValidator(_check_json)]
Subject = Literal["vectors", "presets"]


class Record(BaseModel):
    """Fields that every record has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    created: Seconds
    """seconds since 1970 by the writer's clock: for people; nothing is decided by it"""
    creator: Line = ""
    epoch: Count = 0
    """the lease under which this was written"""


class FileEntry(BaseModel):
    """One file of a vector and the blob that holds its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FileName
    digest: Digest
    size: Size


class VectorDraft(BaseModel):
    """Everything that a publisher states about a vector. Publishing one draft twice makes one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    digest: Digest
    """`PreferenceVector.digest()`: the numbers and their base, whatever the sharding"""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=10_000)]
    preference: Name
    form: Literal["full", "low-rank"]
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    rank: Annotated[int, Field(strict=True, ge=1, le=10**6)] | None = None
    """the largest rank of a low-rank vector's entries"""
    base_fingerprint: Digest
    parents: dict[Name, StatedDigest] = {}
    data_digest: StatedDigest = ""
    recipe: Json = {}
    precision: Json = {}
    metrics: Json = {}
    license: Line = ""
    notes: Notes = ""

    @model_validator(mode="after")
    def _each_file_once(self) -> Self:
        """Names that differ only in case are one file on some disks."""
        if len({file.name.lower() for file in self.files}) < len(self.files):
            raise InputError("files: two have the same name; every file needs its own")
        return self

    @cached_property
    def content(self) -> str:
        """Digest of the draft: what makes a second publication the same version."""
        return digest_of(self.model_dump(mode="json", include=set(VectorDraft.model_fields)))

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class VectorVersion(VectorDraft, Record):
    """A published vector: the manifest `vectors/<name>/<version>.json`. Never changes."""

    kind: Literal["vector"] = "vector"
    version: Version
    libraries: Annotated[dict[Line, Line], Field(max_length=100)] = {}

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class PresetDraft(BaseModel):
    """Named coefficients over pinned versions, with the evidence for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    coefficients: dict[PinnedRef, Eta]
    """pinned reference -> eta"""
    vectors: dict[PinnedRef, Digest]
    """pinned reference -> digest of that vector"""
    base_fingerprint: Digest
    fingerprint: Digest
    """`serving_fingerprint` of base, vectors and coefficients"""
    metrics: Json = {}
    reason: Reason

    @model_validator(mode="after")
    def _one_coefficient_a_vector(self) -> Self:
        _check_same_refs(self.coefficients, self.vectors)
        if len({ref.partition("@")[0] for ref in self.vectors}) < len(self.vectors) or not self.vectors:
            raise InputError("coefficients: expected one version each of one vector or more")
        return self

    @cached_property
    def content(self) -> str:
        return digest_of(self.model_dump(mode="json", include=set(PresetDraft.model_fields)))


class PresetVersion(PresetDraft, Record):
    """A published preset: `presets/<name>/<version>.json`. Never changes."""

    kind: Literal["preset"] = "preset"
    version: Version

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class Move(Record):
    """One step in the history of an alias: from which version to which, who, when and why."""

    kind: Literal["move", "lost-move"] = "move"
    """lost-move: stands where a record of the history was lost; where the alias pointed is not known"""
    subject: Subject
    name: Name
    alias: Label
    sequence: Version
    version: Version | None
    """None: the alias was removed"""
    previous: Version | None
    reason: Reason
    request: Line
    """the caller's id of this request: a request that is repeated after a lost answer moves nothing"""


class Tagging(Record):
    """All tags of one version from here on, and why they changed."""

    kind: Literal["tagging", "lost-tagging"] = "tagging"
    """lost-tagging: stands where a record of the history was lost; what the tags were is not known"""
    subject: Subject
    name: Name
    version: Version
    sequence: Version
    tags: dict[Label, TagValue]
    reason: Reason
    request: Line


class Retirement(Record):
    """This version's bytes may be deleted; its manifest stays, its number is never used again."""

    kind: Literal["retirement"] = "retirement"
    name: Name
    version: Version
    reason: Reason


class Served(Record):
    """What a served fingerprint stands for, so that an answer can be traced back."""

    kind: Literal["served"] = "served"
    fingerprint: Digest
    base_fingerprint: Digest
    """of the base that the vectors were trained on"""
    quantized: Digest | None = None
    """of the quantized copy of it that was served in its place"""
    coefficients: dict[PinnedRef, FiniteFloat]
    vectors: dict[PinnedRef, Digest]

    @model_validator(mode="after")
    def _same_refs(self) -> Self:
        _check_same_refs(self.coefficients, self.vectors)
        return self


class LeaseClaim(Record):
    """Who writes to the store; `lease.py` replaces it, so it is no part of the store's history."""

    kind: Literal["claim"] = "claim"
    owner: Line
    host: Annotated[str, _checked(check_line, "host", 300)] = ""
    pid: Count = 0
    token: Line = ""
    released: bool = False
    lasting: bool = False
    """an actor's: held until it ends, so that there is no use in waiting"""


class Hold(Record):
    """The versions that a running replica uses; replaced and removed by their holder."""

    kind: Literal["hold"] = "hold"
    holder: Name
    refs: tuple[PinnedRef, ...]


def _check_same_refs(coefficients: Mapping[str, float], vectors: Mapping[str, str]) -> None:
    if coefficients.keys() != vectors.keys():
        raise InputError("coefficients and vectors name different references; every coefficient needs its vector")


R = TypeVar("R", bound=BaseModel)


def canonical(value: object) -> bytes:
    """JSON with one spelling only; InputError for what JSON cannot hold (NaN, infinity, other types)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be written as JSON ({error}); give plain, finite values") from None


def build(model: type[R], **fields: Any) -> R:
    """A new record of `model`. InputError names the first field that breaks a rule."""
    try:
        return model(**fields)
    except ValidationError as error:
        raise InputError(first_problem(error)) from None


def digest_of(value: object) -> str:
    return f"blake3:{blake3(canonical(value)).hexdigest()}"


def encode(record: BaseModel) -> bytes:
    """The record as stored."""
    body = canonical(record.model_dump(mode="json"))
    return b'{"blake3":"%s","record":%s}\n' % (blake3(body).hexdigest().encode(), body)


def decode(data: bytes, model: type[R], where: str) -> R:
    """The record of a stored line. StoreError: damaged, or not what it should be. InputError: written by a newer
    release.
    """
    head, body = data[:86], data[86:-2]
    if head != b'{"blake3":"%s","record":' % blake3(body).hexdigest().encode() or data[-2:] != b"}\n":
        raise StoreError(
            f"{where}: the record is damaged (its digest does not match); restore it from a copy or bundle"
        )
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        check_format(body, where)
        raise StoreError(f"{where}: not a sound {model.__name__} ({first_problem(error)}); restore it") from None


def check_format(body: bytes, where: str) -> None:
    """InputError where a record says that it is of a newer format than this release knows."""
    try:
        record = pydantic_core.from_json(body)
    except ValueError:
        return
    found = record.get("format") if isinstance(record, dict) else FORMAT
    if found != FORMAT:
        raise InputError(f"{where}: record format {shown(found)}, this release reads {FORMAT}; upgrade prefvec-ray")


def first_problem(error: ValidationError) -> str:
    """`field: what is wrong with it`, in one line that is safe to print."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    line = f"{field}: {reason}" if field else reason
    return re.sub(r"[^ -~]", "?", line)[:300]


def key_of(record: BaseModel) -> str:
    """Where in a store a record belongs; empty for those that have no place of their own."""
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
    return ""


def serving_fingerprint(base_fingerprint: str, coefficients: Mapping[str, float]) -> str:
    """`blake3:<hex>` of what answers a request: the base and, by vector digest, every coefficient that is not zero.

    Independent of names, versions and order: equal fingerprints mean equal weights. `coefficients` maps the digest of a
    vector to its eta. Raises InputError for a coefficient that is not a finite number.
    """
    used = {digest: float(eta).hex() for digest, eta in coefficients.items() if eta != 0}
    bad = [eta for eta in coefficients.values() if not abs(eta) < float("inf")]
    if bad:
        raise InputError(f"coefficient {bad[0]}: expected a finite number")
    return digest_of({"base": base_fingerprint, "coefficients": used})

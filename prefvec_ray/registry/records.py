"""What the store writes down: small immutable JSON records, each carrying the digest of itself.

A record is one line, `{"blake3": <digest of the record's canonical JSON>, "record": {...}}`. Reading
compares the whole line with what writing would have produced, so that one flipped bit anywhere is found
at the first read.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from prefvec_ray.errors import InputError
from prefvec_ray.registry.errors import StoreError

FORMAT = 1
Digest = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]


class Record(BaseModel):
    """Fields that every record has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    created: float
    """seconds since 1970 by the writer's clock: for people; nothing is decided by it"""
    creator: str = ""
    epoch: int = 0
    """the lease under which this was written"""


class FileEntry(BaseModel):
    """One file of a vector and the blob that holds its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: Digest
    size: int


class VectorDraft(BaseModel):
    """Everything that a publisher states about a vector; two publications of one draft are one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: Digest
    """`PreferenceVector.digest()`: the numbers and their base, whatever the sharding"""
    files: tuple[FileEntry, ...]
    preference: str
    form: str
    dtype: str
    rank: int | None = None
    """the largest rank of a low-rank vector's entries"""
    base_fingerprint: str
    parents: dict[str, str] = {}
    data_digest: str = ""
    recipe: dict[str, JsonValue] = {}
    precision: dict[str, JsonValue] = {}
    metrics: dict[str, JsonValue] = {}
    license: str = ""
    notes: str = ""

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
    version: int
    libraries: dict[str, str] = {}

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class PresetDraft(BaseModel):
    """Named coefficients over pinned versions, with the evidence for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    coefficients: dict[str, FiniteFloat]
    """pinned reference -> eta"""
    vectors: dict[str, Digest]
    """pinned reference -> digest of that vector"""
    base_fingerprint: str
    fingerprint: Digest
    """`serving_fingerprint` of base, vectors and coefficients"""
    metrics: dict[str, JsonValue] = {}
    reason: str

    @cached_property
    def content(self) -> str:
        return digest_of(self.model_dump(mode="json", include=set(PresetDraft.model_fields)))


class PresetVersion(PresetDraft, Record):
    """A published preset: `presets/<name>/<version>.json`. Never changes."""

    kind: Literal["preset"] = "preset"
    version: int

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class Move(Record):
    """One step in the history of an alias: from which version to which, who, when and why."""

    kind: Literal["move"] = "move"
    subject: Literal["vectors", "presets"]
    name: str
    alias: str
    sequence: int
    version: int | None
    """None: the alias was removed"""
    previous: int | None
    reason: str
    request: str
    """the caller's id of this request: a request that is repeated after a lost answer moves nothing"""


class Tagging(Record):
    """All tags of one version from here on, and why they changed."""

    kind: Literal["tagging"] = "tagging"
    subject: Literal["vectors", "presets"]
    name: str
    version: int
    sequence: int
    tags: dict[str, str]
    reason: str
    request: str


class Retirement(Record):
    """This version's bytes may be deleted; its manifest stays, its number is never used again."""

    kind: Literal["retirement"] = "retirement"
    name: str
    version: int
    reason: str


class Served(Record):
    """What a served fingerprint stands for, so that an answer can be traced back."""

    kind: Literal["served"] = "served"
    fingerprint: Digest
    base_fingerprint: str
    coefficients: dict[str, FiniteFloat]
    vectors: dict[str, Digest]


class Claim(Record):
    """Who writes to the store; `lease.py` replaces it, so it is no part of the store's history."""

    kind: Literal["claim"] = "claim"
    owner: str
    host: str = ""
    pid: int = 0
    token: str = ""
    released: bool = False
    lasting: bool = False
    """an actor's: held until it ends, so that there is no use in waiting"""


class Hold(Record):
    """The versions that a running replica uses; replaced and removed by their holder."""

    kind: Literal["hold"] = "hold"
    holder: str
    refs: tuple[str, ...]


R = TypeVar("R", bound=BaseModel)


def canonical(value: object) -> bytes:
    """JSON with one spelling only; InputError for what JSON cannot hold (NaN, infinity, other types)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be written as JSON ({error}); give plain, finite values") from None


def digest_of(value: object) -> str:
    return f"blake3:{blake3(canonical(value)).hexdigest()}"


def encode(record: BaseModel) -> bytes:
    """The record as stored."""
    body = canonical(record.model_dump(mode="json"))
    return b'{"blake3":"%s","record":%s}\n' % (blake3(body).hexdigest().encode(), body)


def decode(data: bytes, model: type[R], where: str) -> R:
    """The record of a stored line. StoreError: damaged. InputError: written by a newer release."""
    head, body = data[:86], data[86:-2]
    if head != b'{"blake3":"%s","record":' % blake3(body).hexdigest().encode() or data[-2:] != b"}\n":
        raise StoreError(
            f"{where}: the record is damaged (its digest does not match); restore it from a copy or bundle"
        )
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        check_format(json.loads(body), where)
        raise StoreError(f"{where}: not a {model.__name__} ({str(error).splitlines()[0]})") from None


def check_format(body: Any, where: str) -> None:
    """InputError where a record says that it is of a newer format than this release knows."""
    found = body.get("format") if isinstance(body, dict) else None
    if found != FORMAT:
        raise InputError(f"{where}: record format {found!r}, this release reads {FORMAT}; upgrade prefvec-ray")


def serving_fingerprint(base_fingerprint: str, coefficients: Mapping[str, float]) -> str:
    """`blake3:<hex>` of what answers a request: the base and, by vector digest, every coefficient that is
    not zero.

    Independent of names, versions and order: equal fingerprints mean equal weights. `coefficients` maps
    the digest of a vector to its eta. Raises InputError for a coefficient that is not a finite number.
    """
    used = {digest: float(eta).hex() for digest, eta in coefficients.items() if eta != 0}
    bad = [eta for eta in coefficients.values() if not abs(eta) < float("inf")]
    if bad:
        raise InputError(f"coefficient {bad[0]}: expected a finite number")
    return digest_of({"base": base_fingerprint, "coefficients": used})

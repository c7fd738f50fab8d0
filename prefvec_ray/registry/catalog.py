"""Names, versions, aliases, presets and tags in a `Store`. No bytes of vectors, no torch, no Ray.

Every method is idempotent, so that a call whose answer was lost can be repeated. Reading methods see every acknowledged
write; writing methods hold the lease.
"""

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.blobs import blob_key
from prefvec_ray.registry.errors import MissingBlob, StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.ledger import Ledger, S, libraries
from prefvec_ray.registry.lineage import Lineage, lineage
from prefvec_ray.registry.maintenance import Collection, collect, repair
from prefvec_ray.registry.names import (
    Ref,
    check_label,
    check_name,
    check_text,
    check_version,
    parse_pinned,
    shown,
)
from prefvec_ray.registry.records import (
    Hold,
    Move,
    PresetDraft,
    PresetVersion,
    Retirement,
    Served,
    Subject,
    Tagging,
    VectorDraft,
    VectorVersion,
    build,
    canonical,
    decode,
    encode,
    key_of,
    serving_fingerprint,
)
from prefvec_ray.registry.store import Store

OPERATIONS = (
    *("resolve", "versions", "names", "list_vectors", "commit_vector"),
    *("publish_preset", "resolve_preset", "list_presets"),
    *("set_alias", "alias_history", "aliases", "set_tags", "tags"),
    *("record_served", "served", "hold", "release", "holds", "retire", "users"),
    *("lineage", "gc", "repair", "damaged"),
)
"""the methods of `Catalog` that can be asked for by name"""


class Catalog:
    """See the module. Thread-safe; it writes while it holds `lease`."""

    def __init__(self, store: Store, lease: Lease):
        self.store, self.lease = store, lease
        self.ledger = Ledger(store, lease)

    def perform(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of OPERATIONS, by name. InputError for any other."""
        if operation not in OPERATIONS:
            raise InputError(f"registry: no method '{operation}'")
        return getattr(self, operation)(*args, **kwargs)

    # -- vectors

    def resolve(self, ref: str) -> VectorVersion:
        """`helpful` (newest), `helpful@3` or `helpful@production` -> the version. InputError where there is none."""
        return self.ledger.resolve("vectors", ref, VectorVersion)

    def versions(self, name: str, subject: Subject = "vectors") -> list[int]:
        """Version numbers in use, oldest first; retired versions are left out."""
        return self.ledger.versions(subject, check_name(name))

    def names(self, subject: Subject = "vectors") -> list[str]:
        return self.ledger.names(subject)

    def list_vectors(
        self,
        text: str = "",
        *,
        base_fingerprint: str | None = None,
        form: str | None = None,
        tags: Mapping[str, str] | None = None,
        newest_only: bool = False,
        skip_damaged: bool = False,
    ) -> list[VectorVersion]:
        """Versions by name and number that match all that is given; `text` is looked for in name, preference and notes.

        Raises StoreError for a damaged manifest and InputError for one of a newer release: whether it matches is not
        known. `skip_damaged` leaves them out; `verify` names them.
        """
        skipped = (StoreError, InputError) if skip_damaged else ()
        found: list[VectorVersion] = []
        for name in self.names():
            numbers = self.versions(name)
            for number in numbers[-1:] if newest_only else numbers:
                with contextlib.suppress(*skipped):
                    version = self.ledger.get("vectors", name, number, VectorVersion)
                    words = f"{version.name}\n{version.preference}\n{version.notes}".lower()
                    fits = text.lower() in words and base_fingerprint in (None, version.base_fingerprint)
                    if fits and form in (None, version.form) and self._tagged(version, tags or {}):
                        found.append(version)
        return found

    def commit_vector(
        self,
        draft: VectorDraft,
        *,
        version: int | None = None,
        creator: str = "",
        like: VectorVersion | None = None,
    ) -> VectorVersion:
        """Make a version of a draft whose blobs are staged. The same draft again is the same version.

        `version` asks for a number: it must be beyond the newest, or already hold this very draft. `like`: an
        import, which keeps time and libraries of the original.
        """
        check_name(draft.name, "vector name")
        origin = {"libraries": libraries()} if like is None else {"libraries": like.libraries, "created": like.created}
        with self.ledger.lock, self.lease.held():  # so that no `gc` comes between looking and committing
            for file in draft.files:
                if self.store.blob_size(file.digest) != file.size:
                    raise MissingBlob(f"{draft.name}: {file.name} ({file.digest}) is not staged in {self.store.label}")
            return self.ledger.commit("vectors", draft, VectorVersion, version, creator, **origin)

    # -- presets

    def publish_preset(
        self,
        name: str,
        coefficients: Mapping[str, float],
        *,
        metrics: Mapping[str, Any] | None = None,
        reason: str,
        version: int | None = None,
        creator: str = "",
    ) -> PresetVersion:
        """Record `{"helpful@1": 0.7, ...}` under a name. References must be pinned, and all of one base model."""
        check_name(name, "preset name")
        check_text(reason, "reason")
        if not coefficients:
            raise InputError(f"preset {name}: no coefficients; give at least one, such as {{'helpful@1': 0.7}}")
        with self._changing():  # so that no `retire` comes between looking and committing
            pinned = self._pinned(coefficients)
            if len({v.name for v in pinned.values()}) < len(coefficients):
                raise InputError(
                    f"preset {name}: names one vector twice ({', '.join(coefficients)}); choose one version each"
                )
            bases = {v.base_fingerprint: ref for ref, v in pinned.items()}
            if len(bases) > 1:
                raise InputError(f"preset {name}: {' and '.join(bases.values())} were made for different base models")
            stated = {"metrics": json.loads(canonical(dict(metrics or {}))), "reason": reason}
            draft = build(PresetDraft, name=name, **stated, **_combination(coefficients, pinned, *bases))
            return self.ledger.commit("presets", draft, PresetVersion, version, creator)

    def resolve_preset(self, ref: str) -> PresetVersion:
        """`cautious`, `cautious@2` or `cautious@production` -> coefficients, pinned vectors and served fingerprint."""
        return self.ledger.resolve("presets", ref, PresetVersion)

    def list_presets(self, *, skip_damaged: bool = False) -> list[PresetVersion]:
        """The newest version of every preset. Raises as `list_vectors` does; `skip_damaged` as there."""
        skipped = (StoreError, InputError) if skip_damaged else ()
        found: list[PresetVersion] = []
        for name in self.names("presets"):
            if self.versions(name, "presets"):
                with contextlib.suppress(*skipped):
                    found.append(self.ledger.resolve("presets", name, PresetVersion))
        return found

    # -- aliases and tags

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int | None,
        reason: str,
        *,
        subject: Subject = "vectors",
        creator: str = "",
        request: str | None = None,
    ) -> Move:
        """Point `name@alias` at a version (None: remove it). The history keeps every move with its reason."""
        check_name(name)
        check_label(alias, "alias")
        check_text(reason, "reason")
        request = request or uuid.uuid4().hex
        with self._changing():
            history = self.ledger.history(f"refs/{subject}/{name}/{alias}", Move)
            if done := [move for move in history if move.request == request]:
                return done[0]
            previous = history[-1].version if history else None
            if version is None and previous is None and not (history and history[-1].kind == "lost-move"):
                raise InputError(f"alias {name}@{alias}: there is none to remove")
            if version is not None and check_version(version) not in self.versions(name, subject):
                raise InputError(self.ledger.unknown(subject, Ref(name, version)))
            fields = {"subject": subject, "name": name, "alias": alias, "version": version, "previous": previous}
            return self._append(Move, history, request, reason, creator, **fields)

    def alias_history(self, name: str, alias: str, *, subject: Subject = "vectors") -> list[Move]:
        """Every move of an alias, oldest first; empty where it never was. StoreError where one is lost."""
        return self.ledger.history(f"refs/{subject}/{check_name(name)}/{check_label(alias, 'alias')}", Move)

    def aliases(self, name: str, *, subject: Subject = "vectors") -> dict[str, int]:
        """alias -> the version it points at now."""
        return self.ledger.aliases(subject, check_name(name))

    def set_tags(
        self,
        ref: str,
        tags: Mapping[str, str],
        reason: str,
        *,
        subject: Subject = "vectors",
        creator: str = "",
        request: str | None = None,
    ) -> Tagging:
        """Replace the tags of a pinned version; the history keeps what they were."""
        pinned = parse_pinned(ref)
        for key, value in tags.items():
            check_label(key, "tag")
            check_text(value, f"tag {key}", 200)
        check_text(reason, "reason")
        request = request or uuid.uuid4().hex
        with self._changing():
            if pinned.version not in self.versions(pinned.name, subject):
                raise InputError(self.ledger.unknown(subject, pinned))
            history = self.ledger.history(f"tags/{subject}/{pinned.name}/{pinned.version}", Tagging)
            if done := [entry for entry in history if entry.request == request]:
                return done[0]
            fields = {"subject": subject, "name": pinned.name, "version": pinned.version, "tags": dict(tags)}
            return self._append(Tagging, history, request, reason, creator, **fields)

    def tags(self, ref: str, *, subject: Subject = "vectors") -> dict[str, str]:
        """The tags of a pinned version now."""
        pinned = parse_pinned(ref)
        step = self.ledger.newest(f"tags/{subject}/{pinned.name}/{pinned.version}", Tagging)
        return step.tags if step else {}

    # -- what is served, held, retired

    def record_served(
        self, coefficients: Mapping[str, float], *, base_fingerprint: str, quantized: str | None = None
    ) -> Served:
        """Record what a served fingerprint stands for; `coefficients` by pinned reference, `quantized`: fingerprint of
        the quantized copy of the base that is served in its place. `served` finds it."""
        with self._changing():
            pinned = self._pinned(coefficients)
            for ref, version in pinned.items():
                if version.base_fingerprint != base_fingerprint:
                    raise InputError(f"{ref}: was made for base {version.base_fingerprint}, not for {base_fingerprint}")
            fields = _combination(coefficients, pinned, base_fingerprint, quantized) | {"quantized": quantized}
            if known := self.served(fields["fingerprint"]):
                return known
            served = build(Served, **fields, **self.ledger.stamp(""))
            self.ledger.write(key_of(served), served)
            return served

    def served(self, fingerprint: str) -> Served | None:
        """What `record_served` recorded under this fingerprint; None where there is nothing."""
        key = f"served/{blob_key(fingerprint)[6:]}.json"
        return self.ledger.load(key, Served) if self.store.read(key) is not None else None

    def hold(self, holder: str, refs: list[str]) -> None:
        """Record that a running replica uses these versions: `gc` keeps them until `release(holder)`."""
        check_name(holder, "holder")
        with self._changing():  # so that no `retire` comes between looking and holding
            held = sorted(self.resolve(ref).ref for ref in refs)
            record = build(Hold, holder=holder, refs=tuple(held), **self.ledger.stamp(holder))
            self.store.overwrite(f"holds/{holder}.json", encode(record))

    def release(self, holder: str) -> None:
        """Remove the hold of `hold`."""
        check_name(holder, "holder")
        with self._changing():
            self.store.delete(f"holds/{holder}.json")

    def holds(self) -> dict[str, list[str]]:
        """holder -> the pinned versions it uses. A hold that cannot be read counts as holding everything: `["*"]`."""
        held = {}
        for file in self.store.children("holds"):
            try:
                refs = decode(self.store.read(f"holds/{file}") or b"", Hold, file).refs
            except (StoreError, InputError):
                refs = ("*",)
            held[file.removesuffix(".json")] = list(refs)
        return held

    def retire(self, ref: str, reason: str) -> Retirement:
        """Allow `gc` to delete the bytes of a version. Refused while an alias, a preset or a replica needs it."""
        pinned = parse_pinned(ref)
        check_text(reason, "reason")
        key = f"retired/{pinned.name}/{pinned.version}.json"
        with self._changing():
            if self.store.read(key):
                return self.ledger.load(key, Retirement)
            if pinned.version not in self.versions(pinned.name):
                raise InputError(self.ledger.unknown("vectors", pinned))
            if users := self.users(ref):
                raise InputError(f"{pinned} cannot be retired: it is used by {', '.join(users)}; move or release these")
            stamp = self.ledger.stamp("")
            retirement = build(Retirement, name=pinned.name, version=pinned.version, reason=reason, **stamp)
            self.ledger.write(key, retirement)
            return retirement

    def users(self, ref: str) -> list[str]:
        """What keeps a pinned version from being retired: aliases, presets (any version), running replicas."""
        pinned = parse_pinned(ref)
        found = []
        for alias in self.ledger.names(f"refs/vectors/{pinned.name}"):
            try:
                if self.ledger.target("vectors", pinned.name, alias) == pinned.version:
                    found.append(f"alias {pinned.name}@{alias}")
            except (StoreError, InputError):
                found.append(f"alias {pinned.name}@{alias} (damaged: what it points at is not known)")
        for used_by, preset in self.ledger.each("presets", PresetVersion):
            if isinstance(preset, Exception):
                found.append(f"preset {used_by} (damaged: what it needs is not known)")
            elif str(pinned) in preset.vectors:
                found.append(f"preset {used_by}")
        return found + [f"replica {holder}" for holder, refs in self.holds().items() if {str(pinned), "*"} & set(refs)]

    # -- all of it

    def lineage(self, what: str) -> Lineage:
        """The graph behind a served fingerprint, a preset or a vector; see `prefvec_ray.registry.lineage`."""
        return lineage(self, what)

    def gc(self, *, apply: bool = False, grace_s: float = 3600.0) -> Collection:
        """Blobs that nothing needs; deletes them with `apply`. See `prefvec_ray.registry.maintenance.collect`."""
        return collect(self, apply=apply, grace_s=grace_s)

    def repair(self, *, apply: bool = False) -> list[str]:
        """Lost steps of aliases' and tags' histories, by key; marked with `apply`. See `maintenance.repair`."""
        return repair(self, apply=apply)

    def damaged(self) -> list[str]:
        """What is wrong with the manifests and presets that cannot be read, a line each."""
        found = [*self.ledger.each("vectors", VectorVersion), *self.ledger.each("presets", PresetVersion)]
        return [str(record) for _, record in found if isinstance(record, Exception)]

    def all_vectors(self) -> Iterator[tuple[str, VectorVersion | None, bool]]:
        """(reference, manifest or None where it is damaged, retired?) of every version that ever was."""
        for ref, found in self.ledger.each("vectors", VectorVersion):
            name, _, number = ref.partition("@")
            retired = int(number) in self.ledger.numbers(f"retired/{name}")
            yield ref, None if isinstance(found, Exception) else found, retired

    # -- below

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lease to look something up and then write. InputError where there is no registry."""
        self.store.require()
        with self.ledger.lock, self.lease.held():
            yield

    def _append(self, model: type[S], history: list[S], request: str, reason: str, creator: str, **fields: Any) -> S:
        """Write the next step of a history."""
        sequence, stamp = len(history) + 1, self.ledger.stamp(creator)
        step = build(model, **fields, sequence=sequence, request=request, reason=reason, **stamp)
        self.ledger.write(key_of(step), step)
        return step

    def _pinned(self, refs: Iterable[str]) -> dict[str, VectorVersion]:
        return {ref: self.resolve(str(parse_pinned(ref))) for ref in refs}

    def _tagged(self, version: VectorVersion, wanted: Mapping[str, str]) -> bool:
        return not wanted or wanted.items() <= self.tags(version.ref).items()


def _combination(
    coefficients: Mapping[str, float], pinned: Mapping[str, VectorVersion], base: str, quantized: str | None = None
) -> dict[str, Any]:
    """What presets and served fingerprints record of coefficients. Two references may stand for one vector: then their
    coefficients add up in the fingerprint.
    """
    etas = {ref: _number(eta, ref) for ref, eta in coefficients.items()}
    total: dict[str, float] = {}
    for ref, version in pinned.items():
        total[version.digest] = total.get(version.digest, 0.0) + etas[ref]
    return {
        "coefficients": etas,
        "vectors": {ref: version.digest for ref, version in pinned.items()},
        "base_fingerprint": base,
        "fingerprint": serving_fingerprint(quantized or base, total),
    }


def _number(eta: object, ref: str) -> float:
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not abs(eta) <= 1e6:
        raise InputError(f"coefficient of {ref}: {shown(eta)} is not a finite number from -1e6 to 1e6")
    return float(eta)

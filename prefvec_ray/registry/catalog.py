"""Names, versions, aliases, presets, tags: what the registry knows, over a `Store`. No bytes of vectors, no
torch, no Ray.

Every method may be called twice with the same arguments without doing anything twice, so that a call
whose answer was lost can be repeated. Reading methods see every acknowledged write; writing methods hold
the lease.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import MissingBlob, StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.ledger import Ledger, V, libraries
from prefvec_ray.registry.names import (
    Ref,
    check_label,
    check_name,
    check_text,
    check_version,
    parse_pinned,
    parse_ref,
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
    serving_fingerprint,
)
from prefvec_ray.registry.store import Store, blob_key

if TYPE_CHECKING:
    from prefvec_ray.registry.lineage import Lineage
    from prefvec_ray.registry.maintenance import Collection

OPERATIONS = (
    *("resolve", "versions", "names", "list_vectors", "commit_vector"),
    *("publish_preset", "resolve_preset", "list_presets"),
    *("set_alias", "alias_history", "aliases", "set_tags", "tags"),
    *("record_served", "served", "hold", "release", "holds", "retire", "users"),
    *("lineage", "gc", "repair", "damaged"),
)
"""the methods of `Catalog` that can be asked for by name"""


class Catalog:
    """See the module. Thread-safe; `lease` is the right under which it writes."""

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
        """`helpful` (newest), `helpful@3` or `helpful@production` -> the version. InputError where there is
        none.
        """
        return self._resolve("vectors", ref, VectorVersion)

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
        """Versions by name and number that match all that is given; `text` is looked for in name, preference
        and notes.

        Raises StoreError for a damaged manifest and InputError for one of a newer release: whether it matches is
        not known. `skip_damaged` leaves them out; `verify` names them.
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
        """Record `{"helpful@1": 0.7, ...}` under a name. References must be pinned, and all of one base
        model.
        """
        check_name(name, "preset name")
        check_text(reason, "reason")
        if not coefficients:
            raise InputError(f"preset {name}: no coefficients; give at least one, such as {{'helpful@1': 0.7}}")
        with self._changing():  # so that no `retire` comes between looking and committing
            draft = self._preset(name, coefficients, metrics or {}, reason)
            return self.ledger.commit("presets", draft, PresetVersion, version, creator)

    def _preset(
        self, name: str, coefficients: Mapping[str, float], metrics: Mapping[str, Any], reason: str
    ) -> PresetDraft:
        pinned = {str(parse_pinned(ref)): self.resolve(ref) for ref in coefficients}
        if len({v.name for v in pinned.values()}) < len(coefficients):
            raise InputError(
                f"preset {name}: names one vector twice ({', '.join(coefficients)}); choose one version each"
            )
        bases = {v.base_fingerprint: ref for ref, v in pinned.items()}
        if len(bases) > 1:
            raise InputError(f"preset {name}: {' and '.join(bases.values())} were made for different base models")
        (base,) = bases
        digests = {ref: v.digest for ref, v in pinned.items()}
        etas = {ref: _number(coefficients[given], given) for ref, given in zip(pinned, coefficients, strict=True)}
        return build(
            PresetDraft,
            name=name,
            coefficients=etas,
            vectors=digests,
            base_fingerprint=base,
            fingerprint=serving_fingerprint(base, _by_digest(etas, digests)),
            metrics=json.loads(canonical(dict(metrics))),
            reason=reason,
        )

    def resolve_preset(self, ref: str) -> PresetVersion:
        """`cautious`, `cautious@2` or `cautious@production` -> coefficients, pinned vectors and served
        fingerprint.
        """
        return self._resolve("presets", ref, PresetVersion)

    def list_presets(self, *, skip_damaged: bool = False) -> list[PresetVersion]:
        """The newest version of every preset. Raises as `list_vectors` does; `skip_damaged` as there."""
        skipped = (StoreError, InputError) if skip_damaged else ()
        found: list[PresetVersion] = []
        for name in self.names("presets"):
            if self.versions(name, "presets"):
                with contextlib.suppress(*skipped):
                    found.append(self._resolve("presets", name, PresetVersion))
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
            folder = f"refs/{subject}/{name}/{alias}"
            history = self.ledger.history(folder, Move)
            if done := [move for move in history if move.request == request]:
                return done[0]
            previous = history[-1].version if history else None
            if version is None and previous is None and not (history and history[-1].kind == "lost-move"):
                raise InputError(f"alias {name}@{alias}: there is none to remove")
            if version is not None and check_version(version) not in self.versions(name, subject):
                raise InputError(self._unknown(subject, Ref(name, version)))
            move = build(
                Move,
                subject=subject,
                name=name,
                alias=alias,
                version=version,
                previous=previous,
                sequence=len(history) + 1,
                reason=reason,
                request=request,
                **self.ledger.stamp(creator),
            )
            self.ledger.write(f"{folder}/{move.sequence}.json", move)
            return move

    def alias_history(self, name: str, alias: str, *, subject: Subject = "vectors") -> list[Move]:
        """Every move of an alias, oldest first; empty where it never was. StoreError where one is lost."""
        return self.ledger.history(f"refs/{subject}/{check_name(name)}/{check_label(alias, 'alias')}", Move)

    def aliases(self, name: str, *, subject: Subject = "vectors") -> dict[str, int]:
        """alias -> the version it points at now."""
        current = {}
        for alias in self.ledger.names(f"refs/{subject}/{check_name(name)}"):
            target = self._target(subject, name, alias)
            if target is not None:
                current[alias] = target
        return current

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
                raise InputError(self._unknown(subject, pinned))
            folder = f"tags/{subject}/{pinned.name}/{pinned.version}"
            history = self.ledger.history(folder, Tagging)
            if done := [entry for entry in history if entry.request == request]:
                return done[0]
            tagging = build(
                Tagging,
                subject=subject,
                name=pinned.name,
                version=pinned.version,
                sequence=len(history) + 1,
                tags=dict(tags),
                reason=reason,
                request=request,
                **self.ledger.stamp(creator),
            )
            self.ledger.write(f"{folder}/{tagging.sequence}.json", tagging)
            return tagging

    def tags(self, ref: str, *, subject: Subject = "vectors") -> dict[str, str]:
        """The tags of a pinned version now."""
        pinned = parse_pinned(ref)
        step = self.ledger.newest(f"tags/{subject}/{pinned.name}/{pinned.version}", Tagging)
        return step.tags if step else {}

    # -- what is served, held, retired

    def record_served(self, coefficients: Mapping[str, float], *, base_fingerprint: str) -> Served:
        """Write down what a served fingerprint stands for; `coefficients` by pinned reference. `served`
        finds it.
        """
        with self._changing():
            return self._record_served(coefficients, base_fingerprint)

    def _record_served(self, coefficients: Mapping[str, float], base_fingerprint: str) -> Served:
        pinned = {ref: self.resolve(str(parse_pinned(ref))) for ref in coefficients}
        for ref, version in pinned.items():
            if version.base_fingerprint != base_fingerprint:
                raise InputError(f"{ref}: was made for base {version.base_fingerprint}, not for {base_fingerprint}")
        etas = {ref: _number(eta, ref) for ref, eta in coefficients.items()}
        fingerprint = serving_fingerprint(base_fingerprint, _by_digest(etas, {r: v.digest for r, v in pinned.items()}))
        with self._changing():
            if known := self.served(fingerprint):
                return known
            served = build(
                Served,
                fingerprint=fingerprint,
                base_fingerprint=base_fingerprint,
                coefficients=etas,
                vectors={ref: version.digest for ref, version in pinned.items()},
                **self.ledger.stamp(""),
            )
            self.ledger.write(f"served/{fingerprint[7:]}.json", served)
            return served

    def served(self, fingerprint: str) -> Served | None:
        """What `record_served` wrote down under this fingerprint, if anything."""
        key = f"served/{blob_key(fingerprint)[6:]}.json"
        return self.ledger.load(key, Served) if self.store.read(key) is not None else None

    def hold(self, holder: str, refs: list[str]) -> None:
        """A running replica uses these versions: `gc` will not touch them until `release(holder)`."""
        check_name(holder, "holder")
        with self._changing():  # so that no `retire` comes between looking and holding
            held = sorted(self.resolve(ref).ref for ref in refs)
            record = build(Hold, holder=holder, refs=tuple(held), **self.ledger.stamp(holder))
            self.store.overwrite(f"holds/{holder}.json", encode(record))

    def release(self, holder: str) -> None:
        """The holder uses nothing any more."""
        check_name(holder, "holder")
        with self._changing():
            self.store.delete(f"holds/{holder}.json")

    def holds(self) -> dict[str, list[str]]:
        """holder -> the pinned versions it uses. A hold that cannot be read counts as holding everything:
        `["*"]`.
        """
        held = {}
        for file in self.store.children("holds"):
            try:
                refs = decode(self.store.read(f"holds/{file}") or b"", Hold, file).refs
            except (StoreError, InputError):
                refs = ("*",)
            held[file.removesuffix(".json")] = list(refs)
        return held

    def retire(self, ref: str, reason: str) -> Retirement:
        """Allow `gc` to delete the bytes of a version. Refused while an alias, a preset or a replica needs
        it.
        """
        pinned = parse_pinned(ref)
        check_text(reason, "reason")
        key = f"retired/{pinned.name}/{pinned.version}.json"
        with self._changing():
            if self.store.read(key):
                return self.ledger.load(key, Retirement)
            if pinned.version not in self.versions(pinned.name):
                raise InputError(self._unknown("vectors", pinned))
            if users := self.users(ref):
                raise InputError(f"{pinned} cannot be retired: it is used by {', '.join(users)}; move or release these")
            stamp = self.ledger.stamp("")
            retirement = build(Retirement, name=pinned.name, version=pinned.version, reason=reason, **stamp)
            self.ledger.write(key, retirement)
            return retirement

    def users(self, ref: str) -> list[str]:
        """What keeps a pinned version from being retired: aliases, presets (any version), running
        replicas.
        """
        pinned = parse_pinned(ref)
        found = []
        for alias in self.ledger.names(f"refs/vectors/{pinned.name}"):
            try:
                if self._target("vectors", pinned.name, alias) == pinned.version:
                    found.append(f"alias {pinned.name}@{alias}")
            except (StoreError, InputError):
                found.append(f"alias {pinned.name}@{alias} (damaged: what it points at is not known)")
        for name in self.names("presets"):
            for number in self.ledger.numbers(f"presets/{name}"):
                try:
                    preset = self.ledger.get("presets", name, number, PresetVersion)
                except (StoreError, InputError):
                    found.append(f"preset {name}@{number} (damaged: what it needs is not known)")
                else:
                    found += [f"preset {preset.ref}"] if str(pinned) in preset.vectors else []
        return found + [f"replica {holder}" for holder, refs in self.holds().items() if {str(pinned), "*"} & set(refs)]

    # -- all of it

    def lineage(self, what: str) -> "Lineage":
        """The graph behind a served fingerprint, a preset or a vector; see `prefvec_ray.registry.lineage`."""
        from prefvec_ray.registry.lineage import lineage

        return lineage(self, what)

    def gc(self, *, apply: bool = False, grace_s: float = 3600.0) -> "Collection":
        """Blobs that nothing needs; deletes them with `apply`. See `prefvec_ray.registry.maintenance.collect`."""
        from prefvec_ray.registry.maintenance import collect

        return collect(self, apply=apply, grace_s=grace_s)

    def repair(self, *, apply: bool = False) -> list[str]:
        """Lost steps of aliases' and tags' histories, by key; marked with `apply`. See `maintenance.repair`."""
        from prefvec_ray.registry.maintenance import repair

        return repair(self, apply=apply)

    def damaged(self) -> list[str]:
        """What is wrong with the manifests and presets that cannot be read, a line each."""
        found = []
        for subject, model in (("vectors", VectorVersion), ("presets", PresetVersion)):
            for name in self.ledger.names(subject):
                for number in self.ledger.numbers(f"{subject}/{name}"):
                    try:
                        self.ledger.load(f"{subject}/{name}/{number}.json", model)
                    except (StoreError, InputError) as error:
                        found.append(str(error))
        return found

    def all_vectors(self) -> Iterator[tuple[str, VectorVersion | None, bool]]:
        """(reference, manifest or None where it is damaged, retired?) of every version that ever was."""
        for name in self.names():
            retired = set(self.ledger.numbers(f"retired/{name}"))
            for number in self.ledger.numbers(f"vectors/{name}"):
                try:
                    manifest = self.ledger.get("vectors", name, number, VectorVersion)
                except (StoreError, InputError):
                    manifest = None
                yield f"{name}@{number}", manifest, number in retired

    # -- below

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The lease, for what is looked up and then written in a registry that exists: only publishing creates one."""
        self.store.require()
        with self.ledger.lock, self.lease.held():
            yield

    def _resolve(self, subject: Subject, ref: str, model: type[V]) -> V:
        parsed = parse_ref(ref)
        numbers = self.versions(parsed.name, subject)
        number = parsed.version
        if parsed.alias is not None:
            number = self._target(subject, parsed.name, parsed.alias)
        elif number is None and numbers:
            number = numbers[-1]
        if number not in numbers or number is None:
            raise InputError(self._unknown(subject, parsed))
        return self.ledger.get(subject, parsed.name, number, model)

    def _unknown(self, subject: Subject, ref: Ref) -> str:
        what = subject[:-1]
        numbers = self.versions(ref.name, subject)
        if ref.version and subject == "vectors" and ref.version in self.ledger.numbers(f"retired/{ref.name}"):
            why = self.ledger.load(f"retired/{ref.name}/{ref.version}.json", Retirement).reason
            return f"{what} {ref} was retired ({why}); use another version: {numbers}"
        if not numbers:
            near = ", ".join(self.names(subject)[:10]) or "none yet"
            return f"no {what} {shown(ref.name)} in {self.store.label}; there are: {near}"
        aliases = self.aliases(ref.name, subject=subject)
        return f"no {what} {ref}; there are versions {numbers[0]} to {numbers[-1]}, aliases {aliases}"

    def _target(self, subject: Subject, name: str, alias: str) -> int | None:
        move = self.ledger.newest(f"refs/{subject}/{name}/{alias}", Move)
        return move.version if move else None

    def _tagged(self, version: VectorVersion, wanted: Mapping[str, str]) -> bool:
        return not wanted or wanted.items() <= self.tags(version.ref).items()


def _number(eta: object, ref: str) -> float:
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not abs(eta) <= 1e6:
        raise InputError(f"coefficient of {ref}: {shown(eta)} is not a finite number from -1e6 to 1e6")
    return float(eta)


def _by_digest(etas: Mapping[str, float], digests: Mapping[str, str]) -> dict[str, float]:
    """Coefficients by the vectors themselves: two references may stand for one vector, and then they add up."""
    total: dict[str, float] = {}
    for ref, eta in etas.items():
        total[digests[ref]] = total.get(digests[ref], 0.0) + eta
    return total

"""The registry as its users see it: the operations of a `Catalog`, and the bytes.

    registry = Registry.open("runs/registry")
    helpful = registry.publish_vector("vectors/helpful", metrics={"gain": 0.21})
    registry.set_alias("helpful", "production", helpful.version, "best on the held-out prompts")
    vector = load_vector(registry.fetch("helpful@production"))

Works in any process without Ray. Where many processes of a cluster publish, `start_registry` puts an actor in front of
the same store, and its client has the same methods.
"""

import contextlib
import functools
import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.bundle import export_bundle, import_bundle
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.catalog import Catalog
from prefvec_ray.registry.errors import MissingBlob
from prefvec_ray.registry.hub import export_huggingface
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.maintenance import Check, check_cache, check_store
from prefvec_ray.registry.names import (
    FILE_ENDINGS,
    FILE_NAME,
    check_line,
    check_name,
    check_text,
    check_version,
    parse_ref,
    shown,
)
from prefvec_ray.registry.records import FileEntry, VectorDraft, VectorVersion, build, canonical
from prefvec_ray.registry.store import Store
from prefvec_ray.registry.verify import Verification, verify

P = ParamSpec("P")
T = TypeVar("T")


class Blobs(Protocol):
    """Where bytes go and come from: the store itself, or Ray where the store is out of reach."""

    def stage(self, source: str | Path, gate: Callable[[], None]) -> tuple[str, int]: ...

    def source(self, file: FileEntry) -> Path | Iterable[bytes]: ...


class Performer(Protocol):
    """Who performs the operations of a `Catalog`: the catalog itself, or the client of its actor."""

    def perform(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def _operation(method: Callable[Concatenate[Catalog, P], T]) -> Callable[Concatenate["Registry", P], T]:
    """`method` of the registry's catalog, wherever that is."""

    @functools.wraps(method)
    def perform(self: "Registry", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.catalog.perform(method.__name__, args, kwargs)

    return perform


class Registry:
    """See the module. `catalog` knows the names; `blobs` and `cache` move the bytes."""

    resolve = _operation(Catalog.resolve)
    versions = _operation(Catalog.versions)
    names = _operation(Catalog.names)
    list_vectors = _operation(Catalog.list_vectors)
    commit_vector = _operation(Catalog.commit_vector)
    publish_preset = _operation(Catalog.publish_preset)
    resolve_preset = _operation(Catalog.resolve_preset)
    list_presets = _operation(Catalog.list_presets)
    set_alias = _operation(Catalog.set_alias)
    alias_history = _operation(Catalog.alias_history)
    aliases = _operation(Catalog.aliases)
    set_tags = _operation(Catalog.set_tags)
    tags = _operation(Catalog.tags)
    record_served = _operation(Catalog.record_served)
    served = _operation(Catalog.served)
    hold = _operation(Catalog.hold)
    release = _operation(Catalog.release)
    holds = _operation(Catalog.holds)
    retire = _operation(Catalog.retire)
    users = _operation(Catalog.users)
    lineage = _operation(Catalog.lineage)
    gc = _operation(Catalog.gc)
    repair = _operation(Catalog.repair)
    damaged = _operation(Catalog.damaged)

    def __init__(self, catalog: Performer, store: Store, lease: Lease, blobs: Blobs, cache: NodeCache):
        self.catalog, self.store, self.lease, self.blobs, self.cache = catalog, store, lease, blobs, cache

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        cache: NodeCache | None = None,
        clock: Callable[[], float] = time.time,
        ttl_s: float = 15.0,
        settle_s: float = 1.0,
        create: bool = True,
    ) -> "Registry":
        """The registry in a folder or `s3://bucket/prefix`.

        `create`: an empty or missing root becomes a registry when something is published into it; reading, holding and
        releasing create nothing. Without it, InputError where there is no registry.

        Writing takes the store's lease for a moment each time (a bucket: a moment is `settle_s`; group
        writes in `with registry.lease.held():`) and raises InputError while an actor owns the store.
        """
        store = Store.open(root, clock=clock, create=create)
        owner = f"process {socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        lease = Lease(store, owner, ttl_s=ttl_s, settle_s=settle_s)
        return cls(Catalog(store, lease), store, lease, store, cache or NodeCache())

    def publish_vector(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        version: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        license: str = "",
        notes: str = "",
        creator: str | None = None,
    ) -> VectorVersion:
        """Publish a vector folder (or file) as the next version of `name`, by default the vector's preference.

        The same files with the same statements again are the same version. `recipe` adds to what the vector file says.
        Raises InputError, and changes nothing, for what `load_vector` refuses, NaN and infinity, names that cannot be
        used, files that are no part of a vector, and a `version` that exists with other content.
        """
        from prefvec_ray.vectors import load_vector

        folder = Path(folder)
        vector = load_vector(folder)
        info = vector.info
        statement: dict[str, Any] = {
            "name": check_name(info.preference if name is None else name, "vector name"),
            "preference": check_name(info.preference, "the vector file's preference"),
            "form": info.form,
            "dtype": info.dtype,
            "base_fingerprint": info.base_fingerprint,
            "parents": info.parents,
            "data_digest": info.data_digest,
            "precision": info.precision,
            "recipe": _merged(info.recipe, recipe or {}),
            "metrics": json.loads(canonical(dict(metrics or {}))),
            "license": check_line(license, "license"),
            "notes": check_text(notes, "notes", 20_000) if notes else "",
            "rank": max((getattr(entry, "rank", 0) for entry in vector.entries.values()), default=0) or None,
        }
        if version is not None:
            self._check_free(statement["name"], check_version(version), vector.digest)
        creator = check_line(user() if creator is None else creator, "creator")
        paths = _files(folder)
        with ThreadPoolExecutor(1) as pool:  # numbers are checked while files are copied; both wait for memory
            digest: Future[str] = pool.submit(vector.validated_digest)
            for attempt in range(3):
                staged = [(name, *self.blobs.stage(path, lambda: _wait(digest))) for name, path in paths.items()]
                files = tuple(build(FileEntry, name=n, digest=d, size=s) for n, d, s in staged)
                draft = build(VectorDraft, **statement, digest=digest.result(), files=files)
                try:
                    return self.commit_vector(draft, version=version, creator=creator)
                except MissingBlob:  # a garbage collection came in between
                    if attempt == 2:
                        raise
        raise AssertionError("unreachable")

    def _check_free(self, name: str, version: int, digest: Callable[[], str]) -> None:
        """Before any byte is written: may `name@version` become, or is it, a vector of this digest?"""
        numbers = self.versions(name)
        if version in numbers and self.resolve(f"{name}@{version}").digest != digest():
            raise InputError(f"{name}@{version} exists with other content, and a version never changes")

    def fetch(self, ref: str) -> Path:
        """A local folder with the version's files, for `load_vector`; pinned in the node's cache until `unpin`."""
        return self.cache.fetch(self.resolve(ref), self.blobs.source)

    @contextlib.contextmanager
    def fetched(self, version: VectorVersion) -> Iterator[Path]:
        """The folder of a version for the time of a block; afterwards it is pinned no longer than it was before."""
        pinned = self.cache.pinned(version)
        try:
            yield self.fetch(version.ref)
        finally:
            if not pinned:
                self.cache.unpin(version)

    def unpin(self, ref: str) -> None:
        """This process no longer reads the version."""
        parse_ref(ref)
        self.cache.unpin(self.resolve(ref))

    def verify(self, *, read_bytes: bool = True) -> Verification:
        """Find every corrupt, missing or orphaned file of the store; changes nothing. See `verify.verify`."""
        return self._on_store_node(functools.partial(verify, read_bytes=read_bytes))

    def doctor(self) -> list[Check]:
        """What may be wrong with the store and with this node's cache, one line each."""
        return [*self._on_store_node(check_store), *check_cache(self.cache)]

    def export_bundle(self, out: str | Path, vectors: Iterable[str] = (), *, presets: Iterable[str] = ()) -> Path:
        """The named versions, and what the presets need, as one file for another registry. See `bundle`."""
        return export_bundle(self, out, vectors, presets)

    def import_bundle(self, path: str | Path, *, renumber: bool = False) -> dict[str, str]:
        """Publish what a bundle holds: its references -> what they are called here. See `bundle.import_bundle`."""
        return import_bundle(self, path, renumber=renumber)

    def export_huggingface(self, ref: str, out: str | Path, *, base_model: str | None = None) -> Path:
        """A folder with a model card that `huggingface_hub` can push. See `hub.export_huggingface`."""
        return export_huggingface(self, ref, out, base_model=base_model)

    def close(self) -> None:
        """Unpin what was fetched and give back the lease, if it is held."""
        self.cache.close()
        self.lease.release()

    def _on_store_node(self, function: Callable[[Store], T]) -> T:
        return function(self.store)


def _files(folder: Path) -> dict[str, Path]:
    """The files to publish, by the names that they get; InputError for what does not belong to a vector.

    A single file becomes `vector.safetensors`, which is the name that a folder's reader looks for.
    """
    if folder.is_file():
        return {"vector.safetensors": folder}
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    root = folder.resolve()
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise InputError(f"{path}: is a link to outside its folder; copy the file itself")
        if not path.is_file() or path.suffix not in FILE_ENDINGS or not FILE_NAME.fullmatch(path.name):
            raise InputError(
                f"{folder}: {shown(path.name)} does not belong to a vector (expected files ending in"
                f" {', '.join(FILE_ENDINGS)}); remove it or publish from a clean folder"
            )
    return {path.name: path for path in paths}


def _merged(stated: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    for key in stated.keys() & added.keys():
        if stated[key] != added[key]:
            raise InputError(
                f"recipe: {shown(key)} is {shown(stated[key])} in the vector file; it cannot be changed here"
            )
    return json.loads(canonical({**stated, **added}))


def _wait(digest: Future[str]) -> None:
    digest.result()


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"

"""Immutable records and content-addressed blobs in a folder or a bucket. Knows nothing of vectors, names or Ray.

    store = Store.open("runs/registry")                    # or "s3://bucket/prefix?region=eu-central-1"
    store.create("vectors/helpful/1.json", data, check)    # once, whole, or not at all
    digest, size = store.stage("vector.safetensors")       # -> blobs/<hex>

In a folder, a record appears by `link(2)`: complete, durable, and never over another one, whoever writes. In a bucket,
a PUT is whole or absent. A bucket with conditional writes (`conditional.py`) refuses to overwrite a record. In one
without them, and wherever something is read before it is written, the lease (`lease.py`) keeps other writers away: this
is why `create` takes its `check`.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from prefvec_ray.common.atomic import make_folder, sync
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_lasting
from prefvec_ray.registry.blobs import CHUNK, blob_key, hash_file
from prefvec_ray.registry.conditional import ConditionalWriter, connect
from prefvec_ray.registry.errors import NoSpace, StoreError
from prefvec_ray.registry.mirror import Mirror
from prefvec_ray.registry.records import LARGEST_RECORD, LAST_SECOND, FileEntry, Line, Record, decode, encode
from prefvec_ray.registry.root import Root

RECORD_FOLDERS = ("vectors", "presets", "refs", "tags", "retired", "served")
OWN_FOLDERS = {*RECORD_FOLDERS, "blobs", "staging", "lease", "holds", "damaged"}
MARKER = "registry.json"


class Marker(Record):
    """`registry.json`: says that this folder is a registry, and which one."""

    uid: Line


class Store:
    """One root. Reads are always fresh unless `load_mirror` was called, which only the holder of the lease may do."""

    def __init__(self, root: str | Path, *, clock: Callable[[], float] = time.time):
        self.root = Root(root)
        self.uri, self.label, self.folder = self.root.uri, self.root.label, self.root.folder
        self.reporting = self.root.reporting
        self.creates = True
        """may `begin` make a registry of an empty root?"""
        self.clock: Callable[[], float] = lambda: min(max(clock(), 0.0), LAST_SECOND)  # what a record can hold
        self.step: Callable[[str], None] = lambda name: None
        """called after each step that a crash could follow"""
        self._mirror: Mirror | None = None
        self._conditional: tuple[ConditionalWriter | None, str] | None = None

    @classmethod
    def open(cls, root: str | Path, *, clock: Callable[[], float] = time.time, create: bool = True) -> "Store":
        """The store at `root`. InputError where something else lies there.

        `create`: the root may still be empty or missing, and becomes a registry with the first write. Without it,
        InputError where there is none.
        """
        store = cls(root, clock=clock)
        store.creates = create
        strangers = set(store.children("")) - OWN_FOLDERS if store.read(MARKER) is None else None
        if strangers and store.read(MARKER) is None:  # still: another process may have begun it in between
            raise InputError(
                f"{store.label}: not a registry (no {MARKER}): holds '{min(strangers)}'; choose an empty one"
            )
        if not create:
            store.require()
        return store

    def require(self) -> None:
        """InputError unless there is a registry at the root."""
        if self.read(MARKER) is None:
            raise InputError(
                f"{self.label}: no registry here (no {MARKER}); check the path and that the storage is mounted, or"
                " publish a vector first"
            )

    def begin(self) -> None:
        """Make the root a registry, unless it is one. InputError where this store may not create one."""
        if self.read(MARKER) is None:
            if not self.creates:
                self.require()
            check_lasting(registry=self.label)
            with contextlib.suppress(FileExistsError):
                self.create(MARKER, encode(Marker(created=self.clock(), uid=uuid.uuid4().hex)), lambda: None)

    @property
    def mirrored(self) -> bool:
        return self._mirror is not None

    @property
    def uid(self) -> str:
        """Identity of the store: the same through every path and mount."""
        data = self.read(MARKER)
        if data is None:
            raise StoreError(f"{self.label}: {MARKER} is gone; is the storage mounted?")
        return decode(data, Marker, MARKER).uid

    # -- records

    def read(self, key: str) -> bytes | None:
        """The stored bytes of a record, None where there is none."""
        if self._mirror is not None and key.partition("/")[0] in RECORD_FOLDERS:
            return self._mirror.read(key)
        return self.read_fresh(key)

    def read_fresh(self, key: str) -> bytes | None:
        """`read` past the mirror."""
        return self.root.read(key, LARGEST_RECORD)

    def children(self, key: str) -> list[str]:
        """Names directly under a folder of records, sorted; empty where there is no such folder."""
        if self._mirror is not None and key.partition("/")[0] in RECORD_FOLDERS:
            return self._mirror.children(key)
        return sorted(self.root.names(key))

    def create(self, key: str, data: bytes, check: Callable[[], None]) -> None:
        """Make a record visible, whole and durable. FileExistsError where the key holds other bytes.

        `check` raises LeaseLost where this process may not write (any more); in a bucket it is asked
        again before the record counts as written.
        """
        check()
        existing = self.read_fresh(key)
        if existing is None and self.folder is not None:
            existing = self._link(self.folder / key, data)
        elif existing is None:
            existing = self._put(key, data)
            self.step("record")
            check()
        if self._mirror is not None:
            self._mirror.add(key, data if existing is None else existing)
        if existing is not None and existing != data:
            raise FileExistsError(key)

    def _put(self, key: str, data: bytes) -> bytes | None:
        """Send a record to the bucket. The other's bytes where somebody was first and the bucket noticed, else None."""
        writer = self.conditional_writes()[0] if key != MARKER else None
        created = writer.create(self.root.path_in_bucket(key), data) if writer else None
        if created is None:
            self.root.write(key, data)
        if created is not False:
            return None
        if (existing := self.read_fresh(key)) is None:
            raise StoreError(f"{self.label}/{key}: the bucket says that it exists, and has no bytes of it; try again")
        return existing

    def conditional_writes(self) -> tuple[ConditionalWriter | None, str]:
        """What creates objects only where there are none; None, and why, where this root has no such thing."""
        if self._conditional is None:
            marker = self.read_fresh(MARKER)
            if self.folder is not None or marker is None:
                return None, "a folder links its records" if self.folder is not None else "nothing is written yet"
            self._conditional = connect(self.uri, self.root.path_in_bucket(MARKER), marker)
        return self._conditional

    def overwrite(self, key: str, data: bytes) -> None:
        """Replace a small file that is no record: the lease, the holds. Whole, but not synced to disk."""
        if self.folder is not None:
            with self.reporting(key), self._temporary() as temporary:
                temporary.write_bytes(data)
                make_folder((self.folder / key).parent)
                temporary.replace(self.folder / key)
            return
        self.root.write(key, data)

    def delete(self, key: str) -> None:
        """Remove a file that `overwrite` wrote, or nothing."""
        with self.reporting(key), contextlib.suppress(FileNotFoundError):
            self.root.fs.delete_file(self.root.path(key))

    def set_aside(self, key: str) -> None:
        """Move a damaged record out of the way, to `damaged/`, or do nothing where there is none."""
        data = self.read_fresh(key)
        if data is None:
            return
        self.overwrite(f"damaged/{key.replace('/', '~')}.{uuid.uuid4().hex[:8]}", data)
        self.delete(key)
        if self._mirror is not None:
            self._mirror.remove(key)

    def _link(self, target: Path, data: bytes) -> bytes | None:
        """Write a temporary, then link it into place. The other's bytes where somebody was first, else None."""
        with self.reporting(target), self._temporary() as temporary:
            temporary.write_bytes(data)
            temporary.chmod(0o644)
            self.step("record-written")
            sync(temporary)
            make_folder(target.parent)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return target.read_bytes()
            self.step("record-linked")
            sync(target.parent)
        self.step("record")
        return None

    def load_mirror(self) -> None:
        """Read every record into memory, damaged ones as they are (empty where they cannot be read). From now on, reads
        come from there.
        """
        mirror = Mirror()
        self._mirror = None
        keys = self.record_keys()
        if self.folder is not None:
            contents: Iterable[bytes | None] = map(self._readable, keys)
        else:
            with ThreadPoolExecutor(32) as pool:
                contents = list(pool.map(self._readable, keys))
        for key, data in zip(keys, contents, strict=True):
            if data is not None:
                mirror.add(key, data)
        self._mirror = mirror

    def _readable(self, key: str) -> bytes | None:
        try:
            return self.read_fresh(key)
        except StoreError:
            return b""

    def record_keys(self) -> list[str]:
        """Keys of all records as they are stored now."""
        if self.folder is not None:
            return sorted(
                f"{where[len(str(self.folder)) + 1 :]}/{file}"
                for top in RECORD_FOLDERS
                for where, _, files in os.walk(self.folder / top)
                for file in files
            )
        keys: list[str] = []
        for top in RECORD_FOLDERS:
            found = self.root.entries(top, recursive=True)
            keys += [info.path[len(self.root.base) + 1 :] for info in found if info.is_file]
        return sorted(keys)

    # -- blobs

    def stage(self, source: str | Path, gate: Callable[[], None] = lambda: None) -> tuple[str, int]:
        """Copy a file's bytes to `blobs/<digest>` and read them back: (digest, size). Nothing refers to them yet.

        A blob that is already there is checked instead, and replaced where it is damaged. `gate` is called once before
        the blob appears and may refuse by raising. Raises StoreError where the disk is full or the file changes
        meanwhile. Whatever is raised, nothing is left behind.
        """
        source = Path(source)
        digest, size = hash_file(source), source.stat().st_size
        self.step("hashed")

        def chunks() -> Iterator[bytes]:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

        self.receive(digest, size, source if self.folder is not None else chunks(), gate)
        return digest, size

    def receive(
        self,
        digest: str,
        size: int,
        source: str | Path | Iterable[bytes | memoryview],
        gate: Callable[[], None] = lambda: None,
    ) -> None:
        """Bytes of known digest and size, from a file or in chunks, become a blob; see `stage`."""
        self.begin()
        if self.has_blob(digest, size):
            gate()
            return
        if self.folder is None:
            gate()
            self._upload(digest, size, source)
            return
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise NoSpace(f"{self.label}: {free} bytes free, {size} needed; make room (`gc`), nothing was written")
        with self.reporting(digest), self._temporary() as temporary:
            if isinstance(source, str | Path):
                shutil.copyfile(source, temporary)
            else:
                with temporary.open("wb") as file:
                    for chunk in source:
                        file.write(chunk)
            self.step("copied")
            temporary.chmod(0o444)
            with ThreadPoolExecutor(1) as pool:  # the disk writes while the processor reads back
                synced = pool.submit(sync, temporary)
                whole = temporary.stat().st_size == size and hash_file(temporary) == digest
                synced.result()
            if not whole:
                raise StoreError(f"{source if isinstance(source, str | Path) else digest}: changed while it was copied")
            self.step("verified")
            gate()
            target = self.folder / blob_key(digest)
            make_folder(target.parent)
            temporary.rename(target)  # over a damaged blob, if there is one: the name says what the bytes must be
            sync(target.parent)
        self.step("blob")

    def _upload(self, digest: str, size: int, source: str | Path | Iterable[bytes | memoryview]) -> None:
        assert not isinstance(source, str | Path)
        path, hasher, sent = self.root.path(blob_key(digest)), blake3(), 0
        try:
            with self.reporting(digest), self.root.fs.open_output_stream(path, compression=None) as stream:
                for chunk in source:
                    hasher.update(chunk)
                    stream.write(chunk)
                    sent += len(chunk)
            if sent != size or f"blake3:{hasher.hexdigest()}" != digest:
                raise StoreError(f"{digest}: the bytes changed while they were sent; try again")
        except BaseException:  # pyarrow completes the upload when the stream is closed, even after an error
            with contextlib.suppress(OSError):
                self.root.fs.delete_file(path)
            raise
        self.step("blob")

    def has_blob(self, digest: str, size: int) -> bool:
        """Is the blob there, whole? A folder's blob is hashed; a bucket's, which checks its own bytes, is measured."""
        if self.blob_size(digest) != size:
            return False
        return self.folder is None or hash_file(self.folder / blob_key(digest)) == digest

    def blob_size(self, digest: str) -> int | None:
        """Size in bytes, None where there is no such blob."""
        if self.folder is not None:
            try:
                return (self.folder / blob_key(digest)).stat().st_size
            except FileNotFoundError:
                return None
        with self.reporting(digest):
            info = self.root.fs.get_file_info(self.root.path(blob_key(digest)))
        return info.size if info.is_file else None

    def read_blob(self, digest: str, chunk: int = CHUNK) -> Iterator[bytes]:
        """The blob's bytes in pieces. Unchecked: who keeps them compares the digest."""
        with (
            self.reporting(digest),
            self.root.fs.open_input_stream(self.root.path(blob_key(digest)), compression=None) as stream,
        ):
            while piece := stream.read(chunk):
                yield piece

    def source(self, file: FileEntry) -> Path | Iterator[bytes]:
        """Where a blob's bytes come from: its path in a folder (never write there), or a stream of pieces."""
        return self.read_blob(file.digest) if self.folder is None else self.folder / blob_key(file.digest)

    def blobs(self) -> dict[str, tuple[int, float]]:
        """Every blob: digest -> (size, time of last change). Files under `blobs/` with other names are not blobs."""
        named = re.compile(r"[0-9a-f]{64}")
        return {
            f"blake3:{info.base_name}": (info.size, info.mtime_ns / 1e9)
            for info in self.root.entries("blobs")
            if info.is_file and named.fullmatch(info.base_name)
        }

    def delete_blob(self, digest: str) -> None:
        self.delete(blob_key(digest))

    def stale_staging(self) -> list[Path]:
        """Temporary files whose writer is gone: nobody holds their lock. (Buckets drop what was not completed.)"""
        if self.folder is None:
            return []
        stale = []
        for path in sorted((self.folder / "staging").glob("*")):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.append(path)
        return stale

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A locked, empty file in `staging/`, gone afterwards. Its lock tells `gc` that the writer lives."""
        assert self.folder is not None
        path = self.folder / "staging" / uuid.uuid4().hex
        make_folder(path.parent)
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

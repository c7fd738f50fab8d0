"""Immutable records and content-addressed blobs in a folder or a bucket. Knows nothing of vectors, names or
Ray.

    store = Store.open("runs/registry")                    # or "s3://bucket/prefix?region=eu-central-1"
    store.create("vectors/helpful/1.json", data, check)    # once, whole, or not at all
    digest, size = store.stage("vector.safetensors")       # -> blobs/<hex>

In a folder a record appears by `link(2)`: complete, durable, and never over another one, whoever writes.
In a bucket a PUT is whole or absent. That it is never over another record is decided by the bucket where it
has conditional writes (`conditional.py`). Where it has none, and for everything that is read before it is
written, that nobody else writes is the lease's business (`lease.py`), which is why `create` takes its `check`.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from pyarrow import ArrowException, fs

from prefvec_ray.common.atomic import make_folder, sync
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_lasting
from prefvec_ray.registry.conditional import ConditionalWriter, connect
from prefvec_ray.registry.errors import NoSpace, StoreError
from prefvec_ray.registry.names import shown
from prefvec_ray.registry.records import LARGEST_RECORD, LAST_SECOND, FileEntry, Line, Record, decode, encode

RECORD_FOLDERS = ("vectors", "presets", "refs", "tags", "retired", "served")
OWN_FOLDERS = {*RECORD_FOLDERS, "blobs", "staging", "lease", "holds", "damaged"}
MARKER = "registry.json"
CHUNK = 8 << 20
BUCKETS = ("s3", "gcs", "abfs")


class Marker(Record):
    """`registry.json`: says that this folder is a registry, and which one."""

    uid: Line


class Store:
    """One root. Reads are always fresh unless `load_mirror` was called, which only the holder of the lease may do."""

    def __init__(self, root: str | Path, *, clock: Callable[[], float] = time.time):
        self.uri = str(root)
        self.creates = True
        """may `begin` make a registry of an empty root?"""
        self.clock: Callable[[], float] = lambda: min(max(clock(), 0.0), LAST_SECOND)  # what a record can hold
        self.folder: Path | None = None
        self.step: Callable[[str], None] = lambda name: None
        """called after each step that a crash could follow"""
        if "://" in self.uri:
            try:
                self.fs, self.base = fs.FileSystem.from_uri(_with_single_puts(self.uri))
            except (ArrowException, OSError, ValueError) as error:
                raise InputError(
                    f"registry root {self.label}: {self._clean(error)}; give a folder or s3://bucket/path"
                ) from None
            if not self.base.strip("/"):
                raise InputError(f"registry root {self.label}: names no place; give a folder or s3://bucket/path")
            if self.fs.type_name == "local":
                self.folder = Path(self.base)
            elif self.fs.type_name not in BUCKETS:
                raise InputError(
                    f"registry root {self.label}: a {self.fs.type_name} filesystem shows files before they"
                    " are complete; use a folder or an s3, gs or abfs bucket"
                )
        else:
            self.folder = Path(self.uri).absolute()
            self.uri = str(self.folder)
            self.fs, self.base = fs.LocalFileSystem(), str(self.folder)
        self._mirror: dict[str, dict[str, bytes | None]] | None = None
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
    def label(self) -> str:
        """The root without credentials, for messages and records."""
        return re.sub(r"//[^/@]*@", "//", self.uri).partition("?")[0]

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
        if self._mirror is not None:
            folder, _, name = key.rpartition("/")
            if folder.partition("/")[0] in RECORD_FOLDERS:
                return self._mirror.get(folder, {}).get(name)
        return self.read_fresh(key)

    def read_fresh(self, key: str) -> bytes | None:
        """`read` past the mirror."""
        if self.folder is not None:
            with self.reporting(key):
                return _read_file(self.folder / key)
        with self.reporting(key):
            try:
                with self.fs.open_input_file(self._path(key)) as stream:
                    if stream.size() > LARGEST_RECORD:
                        raise StoreError(f"{self.label}/{key}: {stream.size()} bytes are no record; look at it")
                    return stream.read()
            except FileNotFoundError:
                return None

    def children(self, key: str) -> list[str]:
        """Names directly under a folder of records, sorted; empty where there is no such folder."""
        if self._mirror is not None and key.partition("/")[0] in RECORD_FOLDERS:
            return sorted(self._mirror.get(key, {}))
        if self.folder is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return sorted(path.name for path in (self.folder / key).iterdir())
            return []
        with self.reporting(key):
            found = self.fs.get_file_info(fs.FileSelector(self._path(key), allow_not_found=True))
        return sorted(info.base_name for info in found)

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
            self._remember(key, data if existing is None else existing)
        if existing is not None and existing != data:
            raise FileExistsError(key)

    def _put(self, key: str, data: bytes) -> bytes | None:
        """Send a record to the bucket. The other's bytes where somebody was first and the bucket noticed, else None."""
        writer = self.conditional_writes()[0] if key != MARKER else None
        created = writer.create(self._path(key).partition("/")[2], data) if writer else None
        if created is None:
            with self.reporting(key), self.fs.open_output_stream(self._path(key), compression=None) as stream:
                stream.write(data)
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
            self._conditional = connect(self.uri, self._path(MARKER).partition("/")[2], marker)
        return self._conditional

    def overwrite(self, key: str, data: bytes) -> None:
        """Replace a small file that is no record: the lease, the holds. Whole, but not synced to disk."""
        if self.folder is not None:
            with self.reporting(key), self._temporary() as temporary:
                temporary.write_bytes(data)
                make_folder((self.folder / key).parent)
                temporary.replace(self.folder / key)
            return
        with self.reporting(key), self.fs.open_output_stream(self._path(key), compression=None) as stream:
            stream.write(data)

    def delete(self, key: str) -> None:
        """Remove a file that `overwrite` wrote, or nothing."""
        with self.reporting(key), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self._path(key))

    def set_aside(self, key: str) -> None:
        """Move a damaged record out of the way, to `damaged/`, or do nothing where there is none."""
        data = self.read_fresh(key)
        if data is None:
            return
        self.overwrite(f"damaged/{key.replace('/', '~')}.{uuid.uuid4().hex[:8]}", data)
        self.delete(key)
        if self._mirror is not None:
            folder, _, name = key.rpartition("/")
            self._mirror.get(folder, {}).pop(name, None)

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
        """Read every record into memory; from now on reads come from there. What is damaged is kept as it
        is, or as empty where it cannot be read at all.
        """
        mirror: dict[str, dict[str, bytes | None]] = {}
        self._mirror = None
        keys = self.record_keys()
        if self.folder is not None:
            contents: Iterable[bytes | None] = map(self._readable, keys)
        else:
            with ThreadPoolExecutor(32) as pool:
                contents = list(pool.map(self._readable, keys))
        self._mirror = mirror
        for key, data in zip(keys, contents, strict=True):
            if data is not None:
                self._remember(key, data)

    def _readable(self, key: str) -> bytes | None:
        try:
            return self.read_fresh(key)
        except StoreError:
            return b""

    def record_keys(self) -> list[str]:
        """Keys of all records as they are stored now."""
        if self.folder is not None:
            found = (
                f"{where[len(str(self.folder)) + 1 :]}/{file}"
                for top in RECORD_FOLDERS
                for where, _, files in os.walk(self.folder / top)
                for file in files
            )
            return sorted(found)
        keys: list[str] = []
        for top in RECORD_FOLDERS:
            with self.reporting(top):
                selector = fs.FileSelector(self._path(top), recursive=True, allow_not_found=True)
                keys += [i.path[len(self.base) + 1 :] for i in self.fs.get_file_info(selector) if i.is_file]
        return sorted(keys)

    def _remember(self, key: str, data: bytes) -> None:
        mirror = self._mirror
        assert mirror is not None
        folder, _, name = key.rpartition("/")
        mirror.setdefault(folder, {})[name] = data
        while "/" in folder:
            folder, _, name = folder.rpartition("/")
            mirror.setdefault(folder, {}).setdefault(name, None)

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
        path, hasher, sent = self._path(blob_key(digest)), blake3(), 0
        try:
            with self.reporting(digest), self.fs.open_output_stream(path, compression=None) as stream:
                for chunk in source:
                    hasher.update(chunk)
                    stream.write(chunk)
                    sent += len(chunk)
            if sent != size or f"blake3:{hasher.hexdigest()}" != digest:
                raise StoreError(f"{digest}: the bytes changed while they were sent; try again")
        except BaseException:  # pyarrow completes the upload when the stream is closed, even after an error
            with contextlib.suppress(OSError):
                self.fs.delete_file(path)
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
            info = self.fs.get_file_info(self._path(blob_key(digest)))
        return info.size if info.is_file else None

    def read_blob(self, digest: str, chunk: int = CHUNK) -> Iterator[bytes]:
        """The blob's bytes in pieces. Unchecked: who keeps them compares the digest."""
        with (
            self.reporting(digest),
            self.fs.open_input_stream(self._path(blob_key(digest)), compression=None) as stream,
        ):
            while piece := stream.read(chunk):
                yield piece

    def source(self, file: FileEntry) -> Path | Iterator[bytes]:
        """Where a blob's bytes come from: its path in a folder (never write there), or a stream of pieces."""
        return self.read_blob(file.digest) if self.folder is None else self.folder / blob_key(file.digest)

    def blobs(self) -> dict[str, tuple[int, float]]:
        """Every blob: digest -> (size, time of last change). Files under `blobs/` with other names are not blobs."""
        with self.reporting("blobs"):
            found = self.fs.get_file_info(fs.FileSelector(self._path("blobs"), allow_not_found=True))
        named = re.compile(r"[0-9a-f]{64}")
        return {
            f"blake3:{info.base_name}": (info.size, info.mtime_ns / 1e9)
            for info in found
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

    # -- below

    def _path(self, key: str) -> str:
        return f"{self.base}/{key}" if key else self.base

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

    @contextlib.contextmanager
    def reporting(self, what: object) -> Iterator[None]:
        """Operating-system errors become one clear line; what callers tell apart passes through."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "no space left; make room (`gc`) and try again" if full else self._clean(error)
            kind = NoSpace if full else StoreError
            raise kind(f"{self.label}: {what}: {advice}; nothing was changed") from error

    def _clean(self, error: Exception) -> str:
        """An error's first line without the credentials that a root may carry."""
        secret = re.search(r"//([^/@]*)@", self.uri)
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return line.replace(self.uri, self.label).replace(secret[1], "…") if secret else line


def _with_single_puts(uri: str) -> str:
    """Let pyarrow send a small object to S3 in one request instead of three."""
    if not uri.startswith("s3://") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def blob_key(digest: str) -> str:
    """`blake3:<hex>` -> `blobs/<hex>`; InputError for anything else."""
    if not isinstance(digest, str) or not re.fullmatch(r"blake3:[0-9a-f]{64}", digest):
        raise InputError(f"digest {shown(digest)}: expected 'blake3:' and 64 hexadecimal digits")
    return f"blobs/{digest[7:]}"


def hash_file(path: str | Path) -> str:
    """`blake3:<hex>` of a file, memory-mapped and on all cores: faster than the disk that it comes from."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return f"blake3:{hasher.hexdigest()}"


def _read_file(path: Path) -> bytes | None:
    """A record's bytes, None where there is none. OSError for whatever is no plain file of a record's size: links are
    not followed, and a pipe does not block.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_RECORD:
        os.close(handle)
        raise OSError(errno.EINVAL, "is no plain file of a record's size")
    with open(handle, "rb") as file:  # noqa: PTH123 - of a handle
        return file.read()

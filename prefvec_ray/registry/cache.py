"""The node's cache: a published vector as a local folder with its original file names, ready to be memory-mapped.

All processes of a node share one cache folder. `flock` on `<entry>.fill` lets one process download while the others
wait; `flock` on `<entry>.use`, shared for as long as a reader's process lives or until `unpin`, keeps the entry from
being evicted. The kernel drops both when a process dies, so nothing is ever left locked.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from blake3 import blake3

from prefvec_ray.common.atomic import new_folder, write_whole
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.blobs import CHUNK, hash_file
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.records import FileEntry, VectorVersion, digest_of

Source = Callable[[FileEntry], Path | Iterable[bytes]]
CHECKED = ".checked"
DEFAULT_BYTES = 100_000_000_000


class NodeCache:
    """Fetched vectors below `folder`, at most `limit_bytes` of them.

    Defaults: `$PREFVEC_CACHE` or `~/.cache/prefvec`, and `$PREFVEC_CACHE_BYTES` or 100 GB.
    """

    def __init__(self, folder: str | Path | None = None, limit_bytes: int | None = None):
        chosen = folder or os.environ.get("PREFVEC_CACHE") or Path.home() / ".cache" / "prefvec"
        limit = limit_bytes if limit_bytes is not None else os.environ.get("PREFVEC_CACHE_BYTES", DEFAULT_BYTES)
        if not str(limit).isdecimal() or int(limit) <= 0:
            raise InputError(f"cache limit {limit!r}: expected a positive number of bytes")
        self.folder, self.limit_bytes = Path(chosen).absolute(), int(limit)
        self.hits = self.misses = 0
        self._pins: dict[str, IO[bytes]] = {}

    def fetch(self, version: VectorVersion, source: Source) -> Path:
        """The folder of a version, complete and checked; `source` gives the bytes that are not here yet.

        A link is made where the bytes lie on the same disk, a copy elsewhere. Files are read-only: they may be the
        store's own. Raises StoreError where the bytes do not have the digest that was published.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = entry_key(version)
        entry = self.folder / key
        if self._use(entry, version):
            self.hits += 1
            return entry
        with self._lock(entry, "fill", fcntl.LOCK_EX):  # the others who miss wait here, then find the entry
            filled = not _intact(entry, version.files) and not _recheck(entry, version.files)
            if filled:
                self._fill(entry, version, source)
            if not self._use(entry, version):
                raise StoreError(f"{entry}: somebody changes files in the cache; keep out of it")
        self.hits, self.misses = self.hits + (not filled), self.misses + filled
        return entry

    def _use(self, entry: Path, version: VectorVersion) -> bool:
        """Pin the entry if it is there, whole."""
        lock = self._lock(entry, "use", fcntl.LOCK_SH)
        if not _intact(entry, version.files):
            lock.close()
            return False
        os.utime(lock.fileno())
        previous, self._pins[entry.name] = self._pins.get(entry.name), lock
        if previous is not None:
            previous.close()
        return True

    def _lock(self, entry: Path, purpose: str, kind: int) -> IO[bytes]:
        lock = entry.with_suffix(f".{purpose}").open("ab")
        try:
            fcntl.flock(lock, kind)
        except OSError:
            lock.close()
            raise
        return lock

    def pinned(self, version: VectorVersion) -> bool:
        """Does this process hold the version?"""
        return entry_key(version) in self._pins

    def unpin(self, version: VectorVersion) -> None:
        """This process no longer reads the version: it may be evicted. What is mapped stays readable."""
        lock = self._pins.pop(entry_key(version), None)
        if lock is not None:
            lock.close()

    def close(self) -> None:
        """Unpin everything."""
        while self._pins:
            self._pins.popitem()[1].close()

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(_size(entry) for entry in self._entries())

    def check(self) -> list[Path]:
        """Entries whose bytes are not what was checked when they came; hashes everything, changes nothing."""
        return [entry for entry in self._entries() if not _recheck(entry, None)]

    def _fill(self, entry: Path, version: VectorVersion, source: Source) -> None:
        """Called with the entry's `fill` lock held."""
        _remove(entry)
        self._make_room(version.size)
        try:
            with new_folder(entry) as temporary:
                for file in version.files:
                    target, bytes_ = temporary / file.name, source(file)
                    digest = _place(bytes_, target) if isinstance(bytes_, Path) else _write(bytes_, target, file.size)
                    if digest != file.digest:
                        raise StoreError(
                            f"{version.ref}: {file.name} does not have the bytes that were published (blob"
                            f" {file.digest}); run `prefvec registry verify`, publish the original again"
                        )
                _sign(temporary, version.files)
        except FileNotFoundError as error:
            raise StoreError(f"{version.ref}: {error.filename or error} is missing in the store") from None
        except OSError as error:
            raise StoreError(f"{version.ref}: cannot be cached in {self.folder} ({error.strerror or error})") from None

    def _make_room(self, needed: int) -> None:
        """Evict entries that no process has pinned, least recently fetched first, until `needed` bytes fit."""
        entries = self._entries()
        excess = sum(map(_size, entries)) + needed - self.limit_bytes
        for entry in sorted(entries, key=lambda entry: _age(entry)):
            if excess <= 0:
                return
            now = fcntl.LOCK_EX | fcntl.LOCK_NB
            with contextlib.suppress(BlockingIOError), self._lock(entry, "fill", now), self._lock(entry, "use", now):
                excess -= _size(entry)
                _remove(entry)
        if excess > 0:
            raise StoreError(
                f"cache {self.folder}: {needed} bytes do not fit under the limit of {self.limit_bytes}, and"
                " running readers hold the rest; raise PREFVEC_CACHE_BYTES or release a reader"
            )

    def _entries(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.name[:1] != "." and (path / CHECKED).is_file()]


def entry_key(version: VectorVersion) -> str:
    """Versions with the same files share an entry."""
    return digest_of({file.name: file.digest for file in version.files})[7:]


def _intact(entry: Path, files: Iterable[FileEntry]) -> bool:
    """Is every file just as it was when its digest was last compared (size, time of change, inode)?"""
    try:
        checked = json.loads((entry / CHECKED).read_text())
        return {file.name: [file.digest, *_stat(entry / file.name)] for file in files} == checked
    except (OSError, ValueError):
        return False


def _recheck(entry: Path, files: Iterable[FileEntry] | None) -> bool:
    """Hash an entry whose files look different. With `files`, sound ones are signed again (a link count
    changes no bytes but a restored copy has another inode).
    """
    try:
        checked = json.loads((entry / CHECKED).read_text())
        sound = all(hash_file(entry / name) == digest for name, (digest, *_) in checked.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    if files is None:
        return sound
    if not sound or {file.name: file.digest for file in files} != {
        name: digest for name, (digest, *_) in checked.items()
    }:
        return False
    _sign(entry, files)
    return True


def _sign(entry: Path, files: Iterable[FileEntry]) -> None:
    text = json.dumps({file.name: [file.digest, *_stat(entry / file.name)] for file in files})
    write_whole(entry / CHECKED, text)


def _stat(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _place(source: Path, target: Path) -> str:
    """Link or copy to a new file. FileExistsError where there is one: it may be a link to the store's own bytes."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or one without links
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK)
        target.chmod(0o444)
    return hash_file(target)


def _write(chunks: Iterable[bytes], target: Path, size: int) -> str:
    """The digest of what arrived; no more than `size` bytes are taken, which is what was published."""
    hasher, left = blake3(max_threads=blake3.AUTO), size
    with target.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            hasher.update(chunk)
            left -= len(chunk)
            if left < 0:
                break
    target.chmod(0o444)
    return f"blake3:{hasher.hexdigest()}"


def _remove(entry: Path) -> None:
    """Rename the entry, then delete it. Files that a process has mapped stay readable until it unmaps them."""
    doomed = entry.with_name(f".{entry.name}.partial-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        entry.rename(doomed)
        shutil.rmtree(doomed)


def _size(entry: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in entry.iterdir())
    return 0


def _age(entry: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return entry.with_suffix(".use").stat().st_mtime
    return 0.0

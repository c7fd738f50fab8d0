"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from prefvec_ray.common.errors import InputError


@contextmanager
def new_file(path: Path, *, mode: int = 0o666, durable: bool = True) -> Iterator[Path]:
    """An empty temporary file beside `path`, which replaces `path` when the block ends, and vanishes when it fails.

    `mode` are its permissions, less the umask. `durable`: synced to disk before it appears.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write or replace a small UTF-8 file. Whole, but not synced to disk."""
    with new_file(path, durable=False) as temporary:
        temporary.write_text(text, "utf-8")


@contextmanager
def new_folder(out: Path, *, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A folder to write into, which becomes `out` by one rename when the block ends, and vanishes when it fails.

    What a killed process left behind is removed on the next try; a folder that another process is still writing is not
    touched. Where the file system has no locks for folders (NFS), leftovers stay. An existing `out` raises InputError,
    unless `replaces(out)` says that it may go.
    """
    if out.exists() and (replaces is None or not replaces(out)):
        hint = "choose another folder" if replaces is None else "it is not what this writes, so it is not replaced"
        raise InputError(f"{out}: already exists; {hint}")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    with ExitStack() as held:
        with _locked(out.parent, wait=True):  # so that nobody takes a new folder for one left behind
            for left in [path for path in out.parent.iterdir() if path.name.startswith(prefix)]:
                with _locked(left) as mine:
                    if mine:
                        shutil.rmtree(left)
            folder = out.with_name(f"{prefix}{uuid.uuid4().hex}")
            folder.mkdir()
            held.enter_context(_locked(folder))
        try:
            yield folder
            sync(folder)
            if out.exists():
                if replaces is None:
                    raise InputError(f"{out}: appeared meanwhile; choose another folder")
                out.rename(old := out.with_name(f"{prefix}replaced"))
                folder.rename(out)
                shutil.rmtree(old)
            else:
                folder.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """mkdir -p, durable: every folder that was made is synced into its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's lock (False if another process does). The kernel frees it when a process ends, however it
    ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        mine = True
    except OSError:  # another's, or a file system without such locks
        mine = False
    try:
        yield mine
    finally:
        os.close(descriptor)

"""Where the files of a store lie: a folder, or a prefix of a bucket; and what can go wrong there, in one line."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pyarrow import ArrowException, fs

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import NoSpace, StoreError

BUCKETS = ("s3", "gcs", "abfs")


class Root:
    """The root of a store. `folder` is its path, None in a bucket; `fs` and `base` are what pyarrow calls it.

    `label` is the root without credentials, for messages and records. InputError for a root that is neither.
    """

    def __init__(self, root: str | Path):
        self.uri = str(root)
        self.label = re.sub(r"//[^/@]*@", "//", self.uri).partition("?")[0]
        self.folder: Path | None = None
        if "://" not in self.uri:
            self.folder = Path(self.uri).absolute()
            self.uri = self.label = self.base = str(self.folder)
            self.fs = fs.LocalFileSystem()
            return
        try:
            self.fs, self.base = fs.FileSystem.from_uri(_with_single_puts(self.uri))
        except (ArrowException, OSError, ValueError) as error:
            reason = self._first_line(error)
            raise InputError(f"registry root {self.label}: {reason}; give a folder or s3://bucket/path") from None
        if not self.base.strip("/"):
            raise InputError(f"registry root {self.label}: names no place; give a folder or s3://bucket/path")
        if self.fs.type_name == "local":
            self.folder = Path(self.base)
        elif self.fs.type_name not in BUCKETS:
            raise InputError(
                f"registry root {self.label}: a {self.fs.type_name} filesystem shows files before they"
                " are complete; use a folder or an s3, gs or abfs bucket"
            )

    def path(self, key: str) -> str:
        """The path of a key, as `fs` takes it."""
        return f"{self.base}/{key}" if key else self.base

    def path_in_bucket(self, key: str) -> str:
        """The path of a key without the bucket's name."""
        return self.path(key).partition("/")[2]

    def read(self, key: str, largest: int) -> bytes | None:
        """A file's bytes, None where there is none. StoreError for more than `largest` bytes, links and pipes."""
        with self.reporting(key):
            if self.folder is not None:
                return _read_plain(self.folder / key, largest)
            try:
                with self.fs.open_input_file(self.path(key)) as stream:
                    if stream.size() > largest:
                        raise StoreError(f"{self.label}/{key}: {stream.size()} bytes are no record; look at it")
                    return stream.read()
            except FileNotFoundError:
                return None

    def names(self, key: str) -> list[str]:
        """Names directly under a folder; none where there is no such folder."""
        if self.folder is None:
            return [info.base_name for info in self.entries(key)]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return [path.name for path in (self.folder / key).iterdir()]
        return []

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object of a bucket, which is whole or absent."""
        with self.reporting(key), self.fs.open_output_stream(self.path(key), compression=None) as stream:
            stream.write(data)

    def entries(self, key: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        """What lies below a folder; nothing where there is no such folder."""
        with self.reporting(key):
            selector = fs.FileSelector(self.path(key), recursive=recursive, allow_not_found=True)
            return self.fs.get_file_info(selector)

    @contextlib.contextmanager
    def reporting(self, what: object) -> Iterator[None]:
        """Operating-system errors become one clear line; what callers tell apart passes through."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "no space left; make room (`gc`) and try again" if full else self._first_line(error)
            kind = NoSpace if full else StoreError
            raise kind(f"{self.label}: {what}: {advice}; nothing was changed") from error

    def _first_line(self, error: Exception) -> str:
        """An error's first line without the credentials that a root may carry."""
        secret = re.search(r"//([^/@]*)@", self.uri)
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return line.replace(self.uri, self.label).replace(secret[1], "…") if secret else line


def _with_single_puts(uri: str) -> str:
    """Let pyarrow send a small object to S3 in one request instead of three."""
    if not uri.startswith("s3://") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def _read_plain(path: Path, largest: int) -> bytes | None:
    """OSError for whatever is no plain file of at most `largest` bytes: links are not followed, and a pipe does not
    block.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > largest:
        os.close(handle)
        raise OSError(errno.EINVAL, "is no plain file of a record's size")
    with open(handle, "rb") as file:  # noqa: PTH123 - of a handle
        return file.read()

"""A file of lines that is kept while something long runs, and outlives whatever kills it."""

import fcntl
import os
from pathlib import Path

from prefvec_ray.common.errors import JobError


def whole_lines(path: Path) -> list[bytes]:
    """The lines that were written to their end; none where there is no file."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


class LineWriter:
    """Appends lines to `path`; a torn last line is cut off. A context manager: until it is closed, or its process ends,
    there is no other.

    Raises:
        JobError: there is another; the message is `busy`.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.file = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise JobError(busy) from error
        self.lines = whole_lines(path)
        self.file.truncate(sum(map(len, self.lines)))

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def add(self, line: str) -> None:
        """Append a line; it is on the disk when this returns."""
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

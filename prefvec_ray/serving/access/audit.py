"""The audit: a line of JSON for every decision about a request for an answer. Keys and prompts are never in it.

JSON escapes line ends and all other control characters, so that nothing a caller writes can look like another line.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import AuditConfig

log = logging.getLogger("ray.serve")

LINE_BYTES = 4096
"""A longer line is written without what was asked for."""


class Asked(BaseModel):
    """What a request asks for: names and numbers, nothing of its prompt."""

    model: str
    preferences: dict[str, float] = {}
    more_preferences: int = 0
    """named by the request and left out here"""
    n: int | None = None
    max_tokens: int | None = None


class AuditEntry(BaseModel):
    """What is known of a request, as far as admission came. What was not set is left out of the line."""

    request: str
    """its id"""
    route: str
    caller: str | None = None
    """a key's id, or `anonymous`"""
    asked: Asked | None = None


class _Lines(RotatingFileHandler):
    """Rotation as the standard library does it, readable for the owner only; a line that is not written is an error.

    Before each line it is checked that the file is still there under its name. One that was moved or deleted begins
    anew. Several fronts may write to one file: each line, and each rotation, is made under a lock of the file beside
    it, which ends in `.lock`. `maxBytes` 0: never rotated.
    """

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).touch(mode=0o600)
        return super()._open()

    def write(self, line: str) -> None:
        with _locked(f"{self.baseFilename}.lock"):
            if self.stream is not None and not self._is_the_named_file():
                if not Path(self.baseFilename).exists():
                    log.warning("the audit %s was moved or deleted; a new one begins", self.baseFilename)
                self.stream.close()
                self.stream = None
            self.emit(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def _is_the_named_file(self) -> bool:
        assert self.stream is not None
        try:
            return os.path.samestat(Path(self.baseFilename).stat(), os.fstat(self.stream.fileno()))
        except OSError:
            return False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        raise


class AuditLog:
    """Appends every decision to a file of bounded size and number, and answers below a floor to a file of their own
    that has no bound. Without a config it keeps nothing.

    Raises InputError where a file cannot be written: an endpoint that must keep an audit does not start without one.
    """

    def __init__(self, config: AuditConfig | None):
        self._lines: _Lines | None = None
        if config is None:
            return
        size = int(config.megabytes * 1e6)
        self._lines = _opened(config.file, size, config.files)
        self._below_floor = _opened(config.below_floor_file, 0, 1)

    def admitted(self, entry: AuditEntry, *, below_floor: bool) -> bool:
        """Append a line for an admitted request; for one below a floor to that file too. False where a line could not
        be written, which goes to the log."""
        return self._write(entry, {"decision": "admitted", "below_floor": below_floor}, below_floor)

    def refused(self, entry: AuditEntry, status: int, code: str | None, reason: str | None) -> bool:
        """The same for a refused request."""
        return self._write(entry, {"decision": "refused", "status": status, "code": code, "reason": reason}, False)

    def _write(self, entry: AuditEntry, decision: dict[str, Any], below_floor: bool) -> bool:
        if self._lines is None:
            return True
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        content = {"time": time, **entry.model_dump(exclude_unset=True), **decision}
        line = json.dumps(content)
        if len(line) > LINE_BYTES:
            line = json.dumps(content | {"asked": f"too long for this line ({len(line)} bytes)"})[:LINE_BYTES]
        try:
            if below_floor:
                self._below_floor.write(line)
            self._lines.write(line)
        except Exception as error:  # a full disk, a folder that is gone
            log.error("a line of the audit could not be written: %s", error)
            return False
        return True


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """By one process at a time."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _opened(file: Path, size: int, files: int) -> _Lines:
    try:
        return _Lines(file, maxBytes=size, backupCount=files - 1, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"audit: {file} cannot be written ({error.strerror}); give a file in a folder that can"
        ) from None

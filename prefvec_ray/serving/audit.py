"""The audit: a line of JSON for every decision about a request for an answer. Keys and prompts are never in it."""

import json
import logging
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from prefvec_ray.errors import InputError
from prefvec_ray.serving.config import AuditConfig

log = logging.getLogger("ray.serve")


class _Lines(RotatingFileHandler):
    """Rotation as the standard library does it, readable for the owner only; a line that is not written is an error."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).touch(mode=0o600)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        raise


class Audit:
    """Appends to a file of bounded size and number. Without a config it keeps nothing.

    Raises InputError where the file cannot be written: an endpoint that must keep an audit does not start without one.
    """

    def __init__(self, config: AuditConfig | None):
        self._lines: _Lines | None = None
        if config is None:
            return
        try:
            size = int(config.megabytes * 1e6)
            self._lines = _Lines(config.file, maxBytes=size, backupCount=config.files - 1, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"audit: {config.file} cannot be written ({error.strerror}); give a file in a folder that can"
            ) from None

    def write(self, **entry: Any) -> bool:
        """Append one line, with the time. False where it could not be written, which goes to the log."""
        if self._lines is None:
            return True
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry})
        try:
            self._lines.emit(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))
        except Exception as error:  # a full disk, a folder that is gone
            log.error("a line of the audit could not be written: %s", error)
            return False
        return True

"""What a search has measured, kept as plain lines that outlive whatever kills it."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from prefvec_ray.errors import InputError, JobError
from prefvec_ray.search.result import Tried


class Journal:
    """The settings that one search has measured or dropped, one JSON line each, in `trials.jsonl`; a torn last line is
    cut off.

    A context manager: until it is closed, or its process ends, no other search can open the folder.

    Raises:
        InputError: the folder holds a search of another definition.
        JobError: another search has it open.
    """

    def __init__(self, folder: Path, definition: dict[str, Any]) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self.folder / "search.json"
        if described.exists():
            earlier = json.loads(described.read_text())
            changed = sorted(key for key in definition if definition[key] != earlier.get(key))
            if changed:
                raise InputError(
                    f"{folder} holds a search with other {', '.join(changed)}; give another folder or delete this one"
                )
        self.path = self.folder / "trials.jsonl"
        self.file = self.path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise JobError(f"another search is running in {folder}: wait for it, or give another folder") from error
        if not described.exists():
            partial = described.with_suffix(".partial")
            partial.write_text(json.dumps(definition, indent=2))
            partial.replace(described)
        whole = self.path.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1]
        self.file.truncate(len(lines))
        self.done = [Tried.model_validate_json(line) for line in lines.splitlines()]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def add(self, tried: Tried) -> None:
        """Append a setting; it is on the disk when this returns."""
        self.file.write(tried.model_dump_json().encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

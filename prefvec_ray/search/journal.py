"""What a search has measured, kept as plain lines that outlive whatever kills it."""

import json
import os
from pathlib import Path
from typing import Any

from prefvec_ray.errors import InputError
from prefvec_ray.search.result import Tried


class Journal:
    """The settings that one search has measured or dropped, one JSON line each, in `trials.jsonl`; a torn last line is
    cut off."""

    def __init__(self, folder: Path, definition: dict[str, Any]) -> None:
        self.folder, self.done = folder.absolute(), list[Tried]()
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self.folder / "search.json"
        if described.exists():
            earlier = json.loads(described.read_text())
            changed = sorted(key for key in definition if definition[key] != earlier.get(key))
            if changed:
                raise InputError(
                    f"{folder} holds a search with other {', '.join(changed)}; give another folder or delete this one"
                )
        else:
            partial = described.with_suffix(".partial")
            partial.write_text(json.dumps(definition, indent=2))
            partial.replace(described)
        self.path = self.folder / "trials.jsonl"
        self.path.touch()
        whole = self.path.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1]
        os.truncate(self.path, len(lines))
        self.done = [Tried.model_validate_json(line) for line in lines.splitlines()]

    def add(self, tried: Tried) -> None:
        """Append a setting; it is on the disk when this returns."""
        with self.path.open("a") as file:
            file.write(tried.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

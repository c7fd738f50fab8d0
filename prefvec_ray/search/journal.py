"""What a search has measured, kept as plain lines that outlive whatever kills it."""

import json
import os
from pathlib import Path
from typing import Any

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.search.result import FailedTrial


class Journal:
    """The finished trials of one search, one JSON line each, in `trials.jsonl`; a torn last line is cut
    off."""

    def __init__(self, folder: Path, definition: dict[str, Any]) -> None:
        self.folder, self.done, self.failed = folder.absolute(), list[Evaluation](), list[FailedTrial]()
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
        self.done = [Evaluation.model_validate_json(line) for line in lines.splitlines()]

    def add(self, evaluation_json: str) -> None:
        with self.path.open("a") as file:
            file.write(evaluation_json + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.append(Evaluation.model_validate_json(evaluation_json))

"""What a search has measured, kept as plain lines that outlive whatever kills it."""

import json
from pathlib import Path
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import parse_json, parse_model, read_json, taking_apart
from prefvec_ray.common.lines import LineWriter
from prefvec_ray.search.result import Ended, Tried

END = b'{"end": '
"""The beginning of the line that records how the search ended."""

ADVICE = "give another folder, or delete this one"


class Journal:
    """The settings that one search has measured or dropped, one JSON line each, in `trials.jsonl`; then how it ended.

    `done` are the settings. `end` is the record of the end, None while no search has ended here, or where one was
    resumed after it: only a record in the last line counts. Journals of earlier versions have none.

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
            earlier = read_json(described, ADVICE)
            changed = sorted(key for key in definition if definition[key] != earlier.get(key))
            if changed:
                raise InputError(
                    f"{folder} holds a search with other {', '.join(changed)}; give another folder or delete this one"
                )
        busy = f"another search is running in {folder}: wait for it, or give another folder"
        self._writer = LineWriter(self.folder / "trials.jsonl", busy)
        if not described.exists():
            partial = described.with_suffix(".partial")
            partial.write_text(json.dumps(definition, indent=2))
            partial.replace(described)
        self.done: list[Tried] = []
        self.end: Ended | None = None
        try:
            self._read()
        except InputError:
            self._writer.file.close()
            raise

    def _read(self) -> None:
        for number, line in enumerate(self._writer.lines, start=1):
            where = f"{self.folder / 'trials.jsonl'}, line {number}"
            if line.startswith(END):
                content = parse_json(line, where, ADVICE)
                with taking_apart(where, ADVICE):
                    self.end = Ended.model_validate(content["end"])
            else:
                self.done.append(parse_model(line, Tried, where, ADVICE))
                self.end = None
        self.done.sort(key=lambda tried: tried.order)  # lines come as settings finish; those of old journals stay so

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.file.close()

    def add(self, tried: Tried) -> None:
        """Append a setting; it is on the disk when this returns."""
        self._writer.add(tried.model_dump_json())

    def close_with(self, end: Ended) -> None:
        """Append how the search ended; it is on the disk when this returns."""
        self._writer.add(json.dumps({"end": end.model_dump(mode="json")}))

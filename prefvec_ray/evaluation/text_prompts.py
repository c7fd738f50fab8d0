"""Prompts from a file, with what the file says about each: a label, a type, any other column."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefvec_ray.errors import InputError


@dataclass(frozen=True)
class TextPrompt:
    """A prompt of a file. Scorers read `label` ("safe", "unsafe": see `RefusalScorer`); the model sees `text` alone."""

    text: str
    label: str | None = None
    type: str | None = None
    """A finer group within the label, such as XSTest's `homonyms`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Every other column, as text."""


def load_prompts(path: str | Path) -> list[TextPrompt]:
    """Read prompts: `.jsonl` or `.csv` with a `prompt` column, or text with a prompt a line.

    The columns `label` and `type` become fields, the others are kept in `columns`. Nothing is left out or stripped.

    Raises:
        InputError: no such file, no prompts, a row without one, or text that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"prompts {path}: no such file")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = [{"prompt": line} for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise InputError(f"prompts {path}: not readable as {path.suffix or 'text'}: {error}") from error
    if not rows:
        raise InputError(f"prompts {path}: holds no prompts; give at least one")
    return [_prompt(row, f"prompts {path}, row {number}") for number, row in enumerate(rows, start=1)]


def _prompt(row: Any, where: str) -> TextPrompt:
    text = row.get("prompt") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: every row needs a `prompt`, a text that is not empty")
    rest = {
        str(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in row.items()
        if name not in (None, "prompt") and value is not None
    }
    return TextPrompt(text, rest.pop("label", None) or None, rest.pop("type", None) or None, rest)


def prompt_messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as chat messages: a text, or an object with a `text`, is one user turn.

    Raises:
        InputError: it is none of these.
    """
    text = getattr(prompt, "text", prompt)
    if isinstance(text, str):
        return [{"role": "user", "content": text}]
    if isinstance(text, Sequence) and text and all(isinstance(turn, Mapping) for turn in text):
        return [dict(turn) for turn in text]
    raise InputError(f"prompt {prompt!r:.80}: expected a text, an object with .text, or a list of chat messages")


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: its own, or a conversation's turns with who speaks before each."""
    messages = prompt_messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)

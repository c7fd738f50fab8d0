"""Prompts from a file, with each one's label, a type, any other column."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.sources import KINDS, few, read_rows, text_lines


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
    """Read prompts: a file of rows (see `read_rows`) with a `prompt` column, or `.txt` with a prompt a line.

    The columns `label` and `type` become fields, the others are kept in `columns`. Nothing is left out or stripped.

    Raises:
        InputError: no such file, no prompts, a row without one, or text that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"prompts {path}: no such file")
    if path.suffix == ".txt":
        try:
            found = [TextPrompt(at.row) for at in few(text_lines(path)) if at.row.strip()]
        except OSError as error:
            raise InputError(f"prompts {path}: cannot be read ({error.strerror})") from error
    elif not path.suffix or not {*path.suffixes} & {*KINDS}:
        raise InputError(
            f"prompts {path}: expected .txt, a prompt a line, or rows in one of {', '.join(KINDS)} with a `prompt`"
        )
    else:
        found = [_prompt(at.row, f"prompts {at.where}") for at in few(read_rows(path))]
    if not found:
        raise InputError(f"prompts {path}: holds no prompts; give at least one")
    return found


def _prompt(row: Any, where: str) -> TextPrompt:
    text = row.get("prompt") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: every row needs a `prompt`, a text that is not empty")
    rest = {
        str(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for name, value in row.items()
        if name != "prompt" and value is not None
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

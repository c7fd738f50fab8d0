"""Foreign text on its way to a person: in a terminal, a log line, a Markdown page.

Names are checked where they come in; notes, reasons and messages are free text, and whoever wrote them may want to
move the cursor, forge a second line or close a table. Everything that prints such text uses this module.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text


def printable(text: object) -> str:
    """One line without control characters: newlines, escape sequences, bidirectional and zero-width characters appear
    as Python writes them (`\\x1b`, `\\n`, `\\u202e`)."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def cell(text: object) -> "Text":
    """A cell of a rich table, without markup: `[red]` stays five characters."""
    from rich.text import Text

    return Text(printable(text))


def printable_json(value: Any) -> str:
    """Indented JSON in ASCII, so that no character of it can act on a terminal."""
    return json.dumps(value, indent=2, ensure_ascii=True)


def markdown_cell(text: object) -> str:
    """A cell of a Markdown table: no markup, no HTML, no second cell."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&])", lambda match: f"&#{ord(match[1])};", printable(text))


def markdown_code(text: object) -> str:
    """A code span in a Markdown table that the text cannot leave."""
    return f"<code>{markdown_cell(text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block, with a fence that is longer than any in the text. Lines stay lines."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [printable(line.replace("\t", "    ")) for line in text.split("\n")]
    return "\n".join([f"{fence}{language}", *lines, fence])


def mermaid_label(parts: Sequence[object]) -> str:
    """A quoted label of a Mermaid graph."""
    text = printable(" ".join(str(part) for part in parts))
    escaped = re.sub(r'["<>`;#\\]', lambda match: f"#{ord(match[0])};", text)
    return f'"{escaped}"'

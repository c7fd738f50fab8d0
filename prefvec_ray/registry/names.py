"""Names and references: `helpful`, `helpful@3`, `helpful@production`.

Names become folders and parts of URLs and model names, so few characters are allowed, and nothing is normalised.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prefvec_ray.common.errors import InputError

THROUGH_RAY = "ray:"
"""begins an address that goes through a registry actor: `ray:<name>`"""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")
FILE_ENDINGS = (".safetensors", ".json", ".md", ".txt")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
LARGEST_VERSION = 10**9 - 1
LARGEST_CHOSEN_VERSION = 10**6
"""the largest number that may be asked for; the store counts on from there, so that no name runs out of numbers"""
LATEST = "latest"


@dataclass(frozen=True)
class Ref:
    """`name` (the newest version), `name@<version>` or `name@<alias>`."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.version or self.alias or LATEST}"


def shown(text: object) -> str:
    """What a caller gave, safe to print: escaped, and cut where it is long."""
    try:
        escaped = repr(text)
    except ValueError:  # an integer of more digits than Python prints
        escaped = f"a {type(text).__name__} that is too long to show"
    return escaped if len(escaped) <= 80 else f"{escaped[:60]}… ({len(escaped)} characters)"


def check_name(name: str, what: str = "name") -> str:
    """`name` itself, or InputError."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise InputError(
            f"{what} {shown(name)}: expected 1 to 64 letters, digits, '.', '_', '+' or '-', starting with a"
            " letter or digit and without '..'; choose another name"
        )
    return name


def check_label(label: str, what: str) -> str:
    """An alias or a tag key: `label` itself, or InputError."""
    if not isinstance(label, str) or not LABEL.fullmatch(label) or label == LATEST:
        raise InputError(
            f"{what} {shown(label)}: expected 1 to 64 letters, digits, '_' or '-', starting with a letter and"
            f" not '{LATEST}' (which is always the newest version); choose another one"
        )
    return label


def check_text(text: str, what: str, limit: int = 2000) -> str:
    """A reason, a note, a tag value: printable and not empty. `text` itself, or InputError."""
    if not isinstance(text, str) or not text.strip() or len(text) > limit:
        raise InputError(f"{what} {shown(text)}: expected a text of 1 to {limit} characters; say why in a sentence")
    if not all(char.isprintable() or char in "\n\t" for char in text):
        raise InputError(f"{what} {shown(text)}: holds control characters; write plain text")
    return text


def check_line(text: str, what: str, limit: int = 200) -> str:
    """A creator, a licence, a digest of data: one printable line, or empty. `text` itself, or InputError."""
    if not isinstance(text, str) or len(text) > limit or not text.isprintable():
        raise InputError(f"{what} {shown(text)}: expected one line of at most {limit} printable characters; shorten it")
    return text


def check_file_name(name: str) -> str:
    """The name of a file of a vector, which every reader creates on its disk. `name` itself, or InputError."""
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name) or not name.endswith(FILE_ENDINGS):
        raise InputError(
            f"file name {shown(name)}: expected letters, digits, '.', '_', '+' or '-' and one of the endings"
            f" {', '.join(FILE_ENDINGS)}; rename the file"
        )
    return name


def check_case(name: str, others: Iterable[str]) -> None:
    """InputError where another name differs from `name` only in case: on some disks they would be one folder."""
    for other in others:
        if other != name and other.lower() == name.lower():
            raise InputError(f"name {name}: there is already '{other}', which differs only in case; use that")


def parse_ref(ref: str) -> Ref:
    """`"helpful@3"` -> Ref("helpful", version=3). InputError for anything that is no reference."""
    if not isinstance(ref, str):
        raise InputError(f"reference {shown(ref)}: expected text such as 'helpful@3'")
    name, at, rest = ref.partition("@")
    check_name(name, f"reference {shown(ref)}: name" if at else "name")
    if not at or rest == LATEST:
        return Ref(name)
    if VERSION.fullmatch(rest):
        return Ref(name, version=int(rest))
    return Ref(name, alias=check_label(rest, f"reference {shown(ref)}: alias"))


def parse_pinned(ref: str) -> Ref:
    """Like `parse_ref`, but only `name@<version>` will do: what is recorded must not move."""
    parsed = parse_ref(ref)
    if parsed.version is None:
        raise InputError(f"{shown(ref)}: expected a pinned version such as '{parsed.name}@1'; resolve it first")
    return parsed


def check_version(version: int, largest: int = LARGEST_VERSION) -> int:
    """A version number from 1 to `largest`, or InputError."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 < version <= largest:
        raise InputError(f"version {shown(version)}: expected a whole number from 1 to {largest}; choose another")
    return version

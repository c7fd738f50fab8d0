"""Credentials out of every text that is shown or stored: messages, tables, records, reports.

`InputError` and `JobError` pass their message through `one_line`, so no caller can forget it.
"""

import re
from typing import Any

HIDDEN = "***"
LONGEST = 4000
"""Characters of a message. What is longer loses its middle."""

_URI = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]{1,20}:)(/{1,3})([^\s'\"<>|`]+)")
_PARAMETER = re.compile(r"([?&;])([\w.%-]{1,80})=([^&;\s'\"<>]+)")
_SENSITIVE = re.compile(
    r"token|secret|sig$|signature|passw|pwd|credential|auth|session|jwt|access_?-?key|api_?-?key|account_?-?key|^key$|^sas",
    re.IGNORECASE,
)
_DATA = re.compile(r"\bdata:(?:[\w.+-]{1,60}/[\w.+-]{1,60})?(?:;[\w.=+-]{1,60}){0,8},[^\s'\"<>]+", re.IGNORECASE)
_TOKENS = re.compile(
    r"\b(hf_|gh[pousr]_|github_pat_|sk-|xox[abpr]-|AKIA|ASIA|Bearer |Basic )(?=[\w~+/.=-]{16})[\w~+/.=-]+"
)
# Control characters, line ends, marks that change the direction of text, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """`text` without what grants access: user and password of addresses, signatures and tokens in their query, the
    content of `data:` addresses, and tokens of known forms (Hugging Face, GitHub, OpenAI, AWS, HTTP)."""
    text = _DATA.sub(f"data:{HIDDEN}", text)
    text = _URI.sub(lambda found: found[1] + found[2] + _without_user(found[3], len(found[2]) > 1), text)
    text = _PARAMETER.sub(_parameter, text)
    return _TOKENS.sub(lambda found: found[1] + HIDDEN, text)


def redacted(value: Any) -> Any:
    """`value` (JSON: dicts, lists, texts, numbers) with every text redacted; for settings that go into a record."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def source_name(source: str) -> str:
    """A source of data or a store as messages and records name it: an address without credentials and without options,
    a path as it is."""
    scheme, found, rest = source.partition("://")
    if not found:
        return redact(source)
    return f"{scheme}://{_without_user(rest, True).partition('?')[0].partition('#')[0]}"


def one_line(message: str) -> str:
    """`message` without credentials, on one line, without control characters, of at most `LONGEST` characters."""
    if len(message) > 4 * LONGEST:  # before the patterns run over it
        message = f"{message[: 2 * LONGEST]} … {message[-2 * LONGEST :]}"
    line = _UNPRINTABLE.sub(_printable, redact(message))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 4 + 3 :]}"


def _without_user(rest: str, plain: bool) -> str:
    """What follows `scheme://` without `user:password@`. A password may hold `/`, `?` or `#`, though it should not.

    Args:
        plain: an `@` before the first slash is enough; otherwise there has to be a `:` before it, too.
    """
    head = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = head.partition("/")[0]
    if "@" in authority and (plain or ":" in authority):
        return rest[authority.rfind("@") + 1 :]
    port = authority.rpartition(":")[2]
    if ":" in authority and not port.isdigit() and not authority.startswith("[") and "@" in rest:
        return rest[(head if "@" in head else rest).rfind("@") + 1 :]
    return rest


def _parameter(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}={HIDDEN if _SENSITIVE.search(found[2]) else found[3]}"


def _printable(found: re.Match[str]) -> str:
    character = found[0]
    return " " if character in "\n\r\t\v\f\x85\u2028\u2029" else f"\\u{ord(character):04x}"

"""From a request's bytes to its checked model, read once and bounded.

Parsing JSON holds the interpreter for as long as it makes objects: every other request waits meanwhile. So lengths are
counted in the bytes first, and what is too long is refused before anything is built of it.
"""

from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from prefvec_ray.serving.access.errors import ApiError

M = TypeVar("M", bound=BaseModel)

LONGEST_ECHO = 100
MOST_ITEMS = 1000
"""in one list of a body, but for token ids, which `MostIds` bounds"""
MOST_FIELDS = 128
"""in one object"""
MOST_VALUES = 10_000
"""lists, objects and what they hold, in all of a body, without token ids"""
MOST_DEPTH = 32
BETWEEN = b", \t\r\n"
OF_IDS = b"0123456789" + BETWEEN
"""the characters of a list of token ids"""
JSON_WORDS = {
    "dict_type": "Input should be an object",
    "list_type": "Input should be a valid array",
    "model_type": "Input should be an object",
}
"""pydantic's messages speak of Python's types, a caller wrote JSON"""


class MostIds(NamedTuple):
    """How many token ids a body may have. Default: as many as it has room for."""

    one: int | None = None
    """in one list"""
    all: int | None = None
    """in all of its lists"""


def parse_body(content: bytes, model: type[M], most_ids: MostIds = MostIds()) -> M:  # noqa: B008 (immutable)
    """The checked request. Raises ApiError(400) that names the first thing wrong with it, never its whole content.

    What it takes is bounded by the size of `content`: lengths are checked before fields, and a list's first wrong item
    ends its check.
    """
    outline = _outline(content)
    _check_lengths(outline, most_ids)
    try:
        parsed = from_json(content)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:LONGEST_ECHO]}") from None
    fields = _check_tree(parsed)
    try:
        body = model.model_validate(parsed)
        if outline.count(b":") > fields:
            # Of a name given twice, parsers take the first or the last: what one checked, another may not see.
            raise ApiError(400, "the body names a field twice in one object; name each once", code="duplicate_field")
        return body
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])[:LONGEST_ECHO]
    text = JSON_WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "extra_forbidden":
        text = "unknown field; see the server's /docs for those that are served"
    raise ApiError(
        400, f"{where}: {text}" if where else text, param=str(problem["loc"][0])[:LONGEST_ECHO] if where else None
    )


def _outline(content: bytes) -> bytes:
    """The body with a `"` for each of its texts."""
    parts = content.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 4 * MOST_VALUES)
    if len(parts) > 4 * MOST_VALUES:  # two for each text, and a text for each value and its name
        raise _too_many(0, 0, "values")
    return b'"'.join(parts[::2])


def _check_lengths(outline: bytes, most_ids: MostIds) -> None:
    """Raises ApiError(400) where the body has more values than any request, or more token ids than this one may."""
    opened = outline.count(b"{") + outline.count(b"[")
    if max(opened, outline.count(b"]")) > MOST_VALUES:
        raise _too_many(0, 0, "values")
    ids = values = 0
    for part in outline.replace(b"]", b"[").split(b"["):  # a list, or what stands between the lists in it
        if part.translate(None, OF_IDS):
            values += part.count(b",")
        elif numbers := part.strip(BETWEEN):
            items = numbers.count(b",") + 1
            ids += items
            if most_ids.one is not None and items > most_ids.one:
                raise _too_many_ids(f"one list has {items}", most_ids.one)
    if values > MOST_VALUES:
        raise _too_many(0, 0, "values")
    if most_ids.all is not None and ids > most_ids.all:
        raise _too_many_ids(f"the body has {ids}", most_ids.all)


def _check_tree(parsed: Any) -> int:
    """The number of fields, over all objects. Raises ApiError(400) where the body has more items, fields, values or
    levels than any request."""
    fields = 0
    left, level = MOST_VALUES, [[parsed]]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for value in level:
            items = list(value.values()) if isinstance(value, dict) else value
            if isinstance(value, list) and set(map(type, value)) == {int}:
                continue
            most = MOST_FIELDS if isinstance(value, dict) else MOST_ITEMS
            left -= len(items)
            if len(items) > most or left < 0:
                raise _too_many(len(items), most, "fields" if isinstance(value, dict) else "items")
            fields += len(items) if isinstance(value, dict) else 0
            inner += [item for item in items if isinstance(item, dict | list)]
        if not inner:
            return fields
        level = inner
    raise ApiError(400, f"the body is nested deeper than {MOST_DEPTH} levels; flatten it", code="too_large")


def _too_many(found: int, most: int, what: str) -> ApiError:
    if found > most:
        message = f"the body has {found} {what} in one place; at most {most} are taken"
    else:
        message = f"the body has more than {MOST_VALUES} values; send fewer"
    return ApiError(400, message, code="too_large")


def _too_many_ids(found: str, most: int) -> ApiError:
    message = f"{found} token ids; at most {most} are taken here; shorten it"
    return ApiError(400, message, code="context_length_exceeded")

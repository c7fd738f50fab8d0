"""Reading small files that others wrote: text, JSON, records of JSON lines. The one place for both.

Every reader has a bound on size and depth, and every fault of a file (missing, a folder, not UTF-8, damaged, out of
reach) is an InputError in one line that names the file.
"""

import errno
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefvec_ray.common.errors import InputError, JobError

TEXT_BYTES = 64 << 20
"""Most bytes of a JSON or text file that is read as a whole."""
DEPTH = 64
"""Most levels of lists and objects inside each other. Deeper content is refused where it is read, since whatever walks
through it later would run out of stack."""

M = TypeVar("M", bound=BaseModel)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETXTBSY, errno.EBUSY)


def read_text(path: str | Path, *, what: str = "", limit: int = TEXT_BYTES) -> str:
    """The UTF-8 text in `path`, with or without a byte order mark. Messages begin with `what` and the path.

    Raises:
        InputError: no such file, not a plain file, more than `limit` bytes, not UTF-8, or out of reach.
    """
    path = Path(path)
    name = f"{what} {path}".strip()
    try:
        if not path.is_file():
            raise InputError(f"{name}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise InputError(f"{name}: larger than {limit >> 20} MiB, the most that is read; check what it is")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); write it as UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: cannot be read ({_reason(error)}); check its path and permissions") from error


def parse_json(text: str | bytes, where: str, advice: str) -> Any:
    """The value that `text` holds.

    Raises:
        InputError: not JSON, an integer of more than 4300 digits, or lists and objects deeper than `DEPTH`; the message
            begins with `where` and ends with `advice`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: lists and objects nested deeper than {DEPTH} levels; {advice}") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({_reason(error)}); {advice}") from error
    check_depth(value, where, advice)
    return value


def check_depth(value: Any, where: str, advice: str) -> None:
    """InputError where lists and dicts of `value` lie deeper than `DEPTH` inside each other."""
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise InputError(f"{where}: lists and objects nested deeper than {DEPTH} levels; {advice}")


def read_json(path: str | Path, advice: str = "copy or make it again") -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: as `read_text` and `parse_json`, or not an object.
    """
    content = parse_json(read_text(path), str(path), advice)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}; {advice}")
    return content


def read_model(path: str | Path, model: type[M], advice: str = "copy or make it again") -> M:
    """The JSON object in `path` as a `model`. InputError as `read_json`, or where it does not fit."""
    return _fitting(read_json(path, advice), model, str(path), advice)


def parse_model(line: bytes, model: type[M], where: str, advice: str) -> M:
    """A line of JSON as a `model`. InputError, which begins with `where`, where it does not fit."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text; {advice}") from error
    return _fitting(parse_json(text, where, advice), model, where, advice)


def parse_models(lines: Iterable[bytes], model: type[M], where: str, advice: str) -> Iterator[M]:
    """A `model` of every line. InputError with the number of the line (from 1) that does not fit."""
    for number, line in enumerate(lines, start=1):
        yield parse_model(line, model, f"{where}, line {number}", advice)


@contextmanager
def taking_apart(where: str, advice: str) -> Iterator[None]:
    """Around code that takes fields out of parsed content and does nothing else: a missing or mistyped field becomes an
    InputError that names `where`."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else _reason(error)
        raise InputError(f"{where}: not what this release writes there ({missing}); {advice}") from error


def os_failure(error: OSError) -> InputError | JobError | None:
    """What to report for an error of the operating system that has nothing to do with a fault of this program.

    Returns:
        A JobError for a full disk or a failing machine, an InputError for a place that cannot be used (no permission,
        read-only, a folder instead of a file), None for everything else: that is a bug, and keeps its traceback.
    """
    name = f"{error.filename}: " if error.filename else ""
    if error.errno in _FULL:
        return JobError(f"{name}no space left ({_reason(error)}); make room and start the same command again")
    if error.errno in _MACHINE:
        return JobError(f"{name}{_reason(error)}; what is finished is kept, start the same command again")
    if error.errno in _PLACE and error.filename:
        return InputError(f"{name}{_reason(error)}; give another place, or correct its permissions")
    return None


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _fitting(content: Any, model: type[M], where: str, advice: str) -> M:
    try:
        return model.model_validate_json(json.dumps(content))
    except (ValidationError, ValueError, RecursionError) as error:
        why = "nested too deeply"
        if isinstance(error, ValidationError):
            problem = error.errors(include_url=False, include_input=False)[0]
            why = f"{'.'.join(map(str, problem['loc'])) or 'top level'}: {problem['msg']}"
        elif isinstance(error, ValueError):
            why = _reason(error)
        raise InputError(f"{where}: {why}; {advice}") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__

"""Reading a YAML config into a pydantic model, with one clear line when something in it is wrong.

Each room keeps its own config model (`training/config.py`, `serving/config.py`); this file knows none of them.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from prefvec_ray.errors import InputError


class Config(BaseModel):
    """A frozen config section. Unknown fields are errors: a typo must not train for a day with the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=BaseModel)


def load_config(path: str | Path, model: type[C]) -> C:
    """Read the YAML file `path` as a `model`.

    `$VAR` and `${VAR}` in strings are replaced from the environment.

    Raises:
        InputError: the file is missing, is not YAML, names an unset variable, or does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"config {path}: expected a mapping of settings at the top, got {type(content).__name__}")
    return parse_config(_expand(content, path), model, source=str(path))


def parse_config(content: dict[str, Any], model: type[C], *, source: str) -> C:
    """Validate `content` as a `model`; `source` names it in the error."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_one_line(error, model)}") from error


def _expand(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if isinstance(value, str) and "$" in value:
        expanded = os.path.expandvars(value)
        if "$" in expanded:
            raise InputError(f"config {path}: {value!r} names an environment variable that is not set")
        return expanded
    return value


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "top level"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_fields_at(model, problem["loc"][:-1]))
            problems.append(f"unknown setting {where!r}" + (f" (known here: {known})" if known else ""))
        elif problem["type"] == "missing":
            problems.append(f"setting {where!r} is missing")
        else:
            problems.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})")
    return "; ".join(problems)


def _fields_at(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """Field names of the section of `model` that `loc` leads to, or none where it leads through a mapping."""
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        model = getattr(field, "annotation", None)
    return list(getattr(model, "model_fields", {}))

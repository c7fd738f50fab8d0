"""Reading a YAML config into a pydantic model, with one clear line when something in it is wrong.

Each room keeps its own config model (`training/config.py`, `serving/config.py`); this file knows none of them.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import DEPTH, read_text
from prefvec_ray.common.redact import redact

YAML_BYTES, YAML_NODES = 1 << 20, 100_000
"""Most bytes of a config, and most values that it may stand for once its aliases are replaced by what they name."""

_MERGE = "tag:yaml.org,2002:merge"


class Config(BaseModel):
    """A frozen config section. Unknown fields are errors: a typo must not train for a day with the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    renamed: ClassVar[dict[str, str]] = {}
    """Earlier name of a field -> its name now, for the error that an old config gets."""


C = TypeVar("C", bound=BaseModel)


def load_config(path: str | Path, model: type[C]) -> C:
    """Read the YAML file `path` as a `model`.

    `$VAR` and `${VAR}` in strings are replaced from the environment.

    Raises:
        InputError: the file is missing, is not YAML, repeats a key, is larger than `YAML_BYTES` or stands for more than
            `YAML_NODES` values, names an unset variable, or does not fit the model.
    """
    content = parse_yaml(read_text(path, what="config", limit=YAML_BYTES), f"config {path}")
    if not isinstance(content, dict):
        raise InputError(f"config {path}: expected a mapping of settings at the top, got {type(content).__name__}")
    return parse_config(_expand(content, path), model, source=str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document: plain data, no objects. InputError as `load_config`; `where` names the text."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{where}: nested deeper than {DEPTH} levels; flatten it") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from error
    # Its constructors let through what Python says of a number or a date that is none.
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(f"{where}: not readable as YAML: a value does not fit its type ({error})") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds: an alias costs nothing to write, and everything to whatever walks through the value."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        sizes: dict[int, int] = {}

        def size(node: Any, depth: int) -> int:
            if depth > DEPTH:
                raise InputError(f"nested deeper than {DEPTH} levels, or an alias inside itself; flatten it")
            if id(node) not in sizes:
                inside = node.value if isinstance(node, yaml.CollectionNode) else []
                parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
                sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
                if sizes[id(node)] > YAML_NODES:
                    raise InputError(f"stands for more than {YAML_NODES:,} values through its aliases; write less")
            return sizes[id(node)]

        if node is not None:
            size(node, 0)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes = getattr(self, "nodes", 0) + 1
        if self.nodes > YAML_NODES:
            raise InputError(f"more than {YAML_NODES:,} values; write less")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode) and not hasattr(node, "checked"):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != _MERGE:
                    raise InputError(f"line {key.start_mark.line + 1}: {key.value!r} is set twice; keep one of them")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            node.checked = True  # type: ignore[attr-defined]  # from here on it holds what `<<` merged into it, too
        return super().construct_mapping(node, deep)


def parse_config(content: dict[str, Any], model: type[C], *, source: str) -> C:
    """Validate `content` as a `model`; `source` names it in the error."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_one_line(error, model)}") from error
    except RecursionError:
        raise InputError(f"{source}: nested too deeply; flatten it") from None


def _expand(value: Any, path: str | Path) -> Any:
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
            section = _section_at(model, problem["loc"][:-1])
            known = ", ".join(getattr(section, "model_fields", {}))
            now = getattr(section, "renamed", {}).get(problem["loc"][-1])
            hint = f"is called {now!r} now" if now else f"(known here: {known})" if known else ""
            problems.append(f"unknown setting {where!r} {hint}".rstrip())
        elif problem["type"] == "missing":
            problems.append(f"setting {where!r} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {message} (got {_short(problem['input'])})")
    return "; ".join(problems)


def _short(value: Any) -> str:
    """A value as a message shows it: its beginning, without credentials."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 77 digits"
    try:
        text = redact(repr(value))
    except (ValueError, RecursionError):  # a huge integer somewhere inside
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]} …"


def _section_at(model: Any, loc: tuple[Any, ...]) -> Any:
    """The section of `model` that `loc` leads to, or None where it leads through a mapping."""
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        model = getattr(field, "annotation", None)
    return model

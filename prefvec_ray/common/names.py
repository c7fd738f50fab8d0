"""The one pattern of names: preferences, presets and models, in configs, requests, vector files and the registry.

A preference that could be written in two ways (`harmless` and `harmless` with a space, a zero-width or a look-alike
character) could have a floor under one spelling and none under the other. So only plain ASCII is a name, and nothing
is normalised.
"""

import re
from typing import Annotated

from pydantic import Field

from prefvec_ray.common.errors import InputError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
"""1 to 64 ASCII letters, digits, '.', '_' or '-', starting with a letter or digit"""
DeltaName = Annotated[str, Field(pattern=rf"^{NAME}[+-]?$", max_length=64)]
"""the same, or a run's delta: the name with its polarity, `helpful+`"""


def check_preference(name: str) -> str:
    """The name of a preference, or of a run's delta (`helpful+`), itself. Raises InputError for any other text."""
    if not isinstance(name, str) or len(name) > 64 or not re.fullmatch(f"{NAME}[+-]?", name):
        shown = ascii(name)[:80]
        raise InputError(
            f"preference {shown}: expected 1 to 64 ASCII letters, digits, '.', '_' or '-', starting with a letter"
            " or digit; choose another name"
        )
    return name


WHOLE = "whole"
"""In the parents of a part of a vector: the vector that it was taken from."""

_PART = re.compile(rf"({NAME}?)\.(depth[1-9]\d?of[1-9]\d?|attention|mlp|other)")


def part_name(name: str) -> tuple[str, str] | None:
    """The preference and the part that `helpful.depth1of3` or `helpful.mlp` names; None for any other name."""
    found = _PART.fullmatch(name)
    return (found[1], found[2]) if found else None


_LOOK_ALIKE = str.maketrans({"i": "l", "1": "l", "0": "o", "5": "s"})


def skeleton(name: str) -> str:
    """What is left of a preference's name without case, punctuation and ASCII look-alikes (`l`, `I` and `1`).

    Two names of one skeleton are probably meant to be taken for each other; see `policy.no_way_around`.
    """
    return re.sub(r"[^a-z0-9]", "", name.casefold()).translate(_LOOK_ALIKE)

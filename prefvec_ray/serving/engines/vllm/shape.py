"""What compiled code must know of the vectors beforehand: how many columns, and beside which layers.

It is part of vLLM's configuration (`additional_config`) and so of the name under which vLLM keeps compiled code.
"""

import re
from collections.abc import Iterable
from typing import Self

from pydantic import PositiveInt

from prefvec_ray.common.config import Config
from prefvec_ray.vectors import LowRank, PreferenceVector


class SteeringShape(Config):
    """Layers are patterns of their names in the checkpoint, with `*` for numbers: `model.layers.*.mlp.down_proj`."""

    columns: PositiveInt
    """the vectors' ranks together; a vector without low-rank changes has one"""
    linears: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @classmethod
    def of(cls, vectors: Iterable[PreferenceVector], columns: int | None = None) -> Self:
        """What these vectors change. `columns` None: room for as many again, so that a roll-out may replace all."""
        linears, norms, needed = set(), set(), {}
        for vector in vectors:
            needed[vector.digest()] = width(vector)
            for name, entry in vector.entries.items():
                path, _, kind = name.rpartition(".")
                if kind == "weight" and isinstance(entry, LowRank):
                    linears.add(pattern(path))
                elif kind == "weight" and len(entry.shape) == 1:
                    norms.add(pattern(path))
        columns = columns or 2 * sum(needed.values())
        return cls(columns=columns or 1, linears=tuple(sorted(linears)), norms=tuple(sorted(norms)))


def pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def width(vector: PreferenceVector) -> int:
    """Columns that the vector takes: its largest rank."""
    return max((entry.rank for entry in vector.entries.values() if isinstance(entry, LowRank)), default=1)

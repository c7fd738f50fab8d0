"""One entry of a preference vector: the change of one parameter, in one of three shapes.

An entry knows its numbers and how to become a dense fp32 tensor; it knows nothing of names, files or models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import numbers

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {**FLOAT_DTYPES, "int8": torch.int8}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16". InputError for what the numbers of a vector are not stored in."""
    for name, known in FLOAT_DTYPES.items():
        if known == dtype:
            return name
    raise InputError(f"cannot store a vector in {dtype}; choose one of {', '.join(FLOAT_DTYPES)} (int8: to_int8)")


@dataclass(frozen=True)
class Full:
    """phi itself, in the parameter's shape."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dense(self) -> Tensor:
        return self.values.float()

    def parts(self) -> dict[str, Tensor]:
        return {"full": self.values}

    def squared_norm(self) -> float:
        return _squared(self.values)


@dataclass(frozen=True)
class Int8:
    """phi = values * scale, with one fp32 scale per row (all dimensions but the last index a row)."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dense(self) -> Tensor:
        return self.values.float() * self.scale.unsqueeze(-1)

    def parts(self) -> dict[str, Tensor]:
        return {"int8": self.values, "scale": self.scale}

    def squared_norm(self) -> float:
        return _squared(self.dense())


@dataclass(frozen=True)
class LowRank:
    """phi = B A. `A_RI` is (..., r, in) and `B_OR` is (..., out, r); leading dimensions are experts."""

    A_RI: Tensor
    B_OR: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.B_OR.shape[:-1] + self.A_RI.shape[-1:]

    @property
    def rank(self) -> int:
        return self.A_RI.shape[-2]

    def dense(self) -> Tensor:
        return self.B_OR.float() @ self.A_RI.float()

    def parts(self) -> dict[str, Tensor]:
        return {"A": self.A_RI, "B": self.B_OR}

    def squared_norm(self) -> float:
        """|B A|^2 = <B^T B, A A^T>, through two r x r Gram matrices and never through the product."""
        A_RI, B_OR = self.A_RI.double(), self.B_OR.double()
        return ((B_OR.mT @ B_OR) * (A_RI @ A_RI.mT)).sum().clamp(min=0).item()


Entry: TypeAlias = Full | Int8 | LowRank
Form: TypeAlias = Literal["full", "low-rank"]


def form_of(entries: Mapping[str, Entry]) -> Form:
    """The form of a vector of these entries: low-rank if any of them is."""
    return "low-rank" if any(isinstance(entry, LowRank) for entry in entries.values()) else "full"


def scaled(entry: Entry, factor: float) -> Entry:
    """factor * phi, in fp32; a low-rank entry carries the factor in B."""
    if isinstance(entry, LowRank):
        return LowRank(entry.A_RI.float(), entry.B_OR.float() * factor)
    return Full(entry.dense() * factor)


def added(left: Entry, right: Entry) -> Entry:
    """left + right in fp32. Two low-rank entries stay exact: their factors are put side by side, ranks add up."""
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        A_RI = torch.cat([left.A_RI.float(), right.A_RI.float()], dim=-2)
        return LowRank(A_RI, torch.cat([left.B_OR.float(), right.B_OR.float()], dim=-1))
    return Full(left.dense() + right.dense())


def cast(entry: Entry, dtype: torch.dtype) -> Entry:
    """The entry with its numbers rounded to a floating dtype (an int8 entry is expanded first)."""
    if isinstance(entry, LowRank):
        return LowRank(entry.A_RI.to(dtype), entry.B_OR.to(dtype))
    return Full((entry.values if isinstance(entry, Full) else entry.dense()).to(dtype))


def quantized(entry: Entry) -> Entry:
    """Symmetric int8 with one scale per row. Entries of fewer than two dimensions stay fp32: they are tiny."""
    dense = entry.dense()
    if dense.dim() < 2:
        return Full(dense)
    scale = dense.abs().amax(dim=-1) / 127
    steps = dense / torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    return Int8(steps.round().clamp(-127, 127).to(torch.int8), scale)


def error_norm(exact: Entry, stored: Entry) -> float:
    """Squared Frobenius norm of exact - stored, in float64; for two low-rank entries without any product B A.

    B A - B' A' = (B - B') A + B' (A - A'), so |.|^2 comes from r x r matrices, without cancellation where B' and A' are
    roundings of B and A. The entry of lower rank is filled up with zeros.
    """
    if not (isinstance(exact, LowRank) and isinstance(stored, LowRank)):
        same = isinstance(exact, Full) and isinstance(stored, Full) and exact.values is stored.values
        return 0.0 if same else _squared(exact.dense() - stored.dense())
    rank = max(exact.rank, stored.rank)
    A_RI, stored_A = (pad(e.A_RI.double(), (0, 0, 0, rank - e.rank)) for e in (exact, stored))
    B_OR, stored_B = (pad(e.B_OR.double(), (0, rank - e.rank)) for e in (exact, stored))
    dA_RI, dB_OR = A_RI - stored_A, B_OR - stored_B
    first = ((dB_OR.mT @ dB_OR) * (A_RI @ A_RI.mT)).sum()
    second = ((stored_B.mT @ stored_B) * (dA_RI @ dA_RI.mT)).sum()
    cross = ((dB_OR.mT @ stored_B) * (A_RI @ dA_RI.mT)).sum()
    return (first + second + 2 * cross).clamp(min=0).item()


def _squared(values: Tensor) -> float:
    """|values|^2: fp32 along the last dimension, float64 across rows (20 times faster than a float64 copy)."""
    rows = torch.linalg.vector_norm(values.float(), dim=-1) if values.dim() > 1 else values
    return torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2


def is_finite(entry: Entry) -> bool:
    """Is there neither NaN nor infinity among the entry's numbers?"""
    return all(map(numbers.is_finite, entry.parts().values()))


def from_parts(parts: Mapping[str, Tensor]) -> Entry | None:
    """The entry that `parts()` came from, or None where the suffixes or shapes do not fit together."""
    match sorted(parts):
        case ["full"]:
            return Full(parts["full"])
        case ["int8", "scale"]:
            entry: Entry = Int8(parts["int8"], parts["scale"])
            return entry if parts["scale"].shape == entry.shape[:-1] else None
        case ["A", "B"]:
            A_RI, B_OR = parts["A"], parts["B"]
            fits = A_RI.dim() == B_OR.dim() >= 2 and A_RI.shape[-2] == B_OR.shape[-1] > 0
            return LowRank(A_RI, B_OR) if fits and A_RI.shape[:-2] == B_OR.shape[:-2] else None
    return None

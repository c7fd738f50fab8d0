"""The same vector in another form: fewer bits, or fewer ranks. Every conversion measures and states its error.

    small = to_low_rank(vector, energy=0.99)
    small.info.precision["conversions"][-1]["relative_error"]

Errors are |phi - converted| / |phi|, over all entries, against the vector that was converted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.entries import Entry, Full, LowRank, cast, dtype_name, is_finite, quantized
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.precision import StorageLoss


def to_dtype(vector: PreferenceVector, dtype: torch.dtype) -> PreferenceVector:
    """The same form in fp32, bf16 or fp16; an int8 vector becomes a plain full one.

    Rounding phi once costs 0.17% in bf16, and 0.02% in fp16 while its numbers are above 6e-5, where fp16 runs short.
    Raises InputError for other dtypes and for numbers that overflow fp16.
    """
    form = "low-rank" if vector.info.form == "low-rank" else "full"
    return _converted(vector, lambda entry: cast(entry, dtype), form=form, dtype=dtype_name(dtype))


def to_full(vector: PreferenceVector, dtype: torch.dtype = torch.bfloat16) -> PreferenceVector:
    """Every entry multiplied out to the parameter's shape."""
    return _converted(vector, lambda entry: Full(entry.dense().to(dtype)), form="full", dtype=dtype_name(dtype))


def to_int8(vector: PreferenceVector) -> PreferenceVector:
    """Full form in int8, symmetric, one fp32 scale per row; one-dimensional entries stay fp32."""
    return _converted(vector, quantized, form="full", dtype="int8")


def to_low_rank(
    vector: PreferenceVector,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreferenceVector:
    """Every matrix as B A by truncated SVD (the best approximation of its rank, Eckart-Young); other entries stay full.

    Give either `rank` (the same for all matrices) or `energy` in (0, 1]: the smallest rank per matrix that keeps that
    share of |phi|^2. Stacks of matrices (experts) share the rank of their neediest. A low-rank vector is shortened
    without being multiplied out.
    """
    check_rank(rank, energy)
    chosen = {"rank": rank} if rank is not None else {"energy": energy}
    return _converted(
        vector,
        lambda entry: shortened(entry, rank=rank, energy=energy, dtype=dtype),
        form="low-rank",
        dtype=dtype_name(dtype),
        **chosen,
    )


def check_rank(rank: int | None, energy: float | None) -> None:
    """InputError unless exactly one of the two is given and makes sense."""
    if (rank is None) == (energy is None):
        raise InputError("give either rank or energy, e.g. rank=32 or energy=0.99")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; expected a share of |phi|^2 in (0, 1]")


def shortened(entry: Entry, *, rank: int | None, energy: float | None, dtype: torch.dtype = torch.float32) -> Entry:
    """One entry of `to_low_rank`."""
    if len(entry.shape) < 2:
        return cast(entry, dtype)
    U_OK, S_K, V_IK = svd(entry)
    keep = min(S_K.shape[-1], rank) if rank is not None else _rank_for(S_K, energy or 1.0)
    root = S_K[..., :keep].sqrt().unsqueeze(-2)  # split evenly, so that neither factor leaves fp16's range
    return LowRank((V_IK[..., :keep] * root).mT.to(dtype), (U_OK[..., :keep] * root).to(dtype))


def svd(entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a matrix entry in float64: U (..., out, k), S (..., k) descending, V (..., in, k).

    A low-rank entry goes through QR of its factors and an r x r SVD. A dense one goes through the eigenvectors of its
    smaller Gram matrix, which is far cheaper than a full SVD and exact down to singular values of 1e-8 of the largest.
    """
    if isinstance(entry, LowRank):
        Qb, Rb = torch.linalg.qr(entry.B_OR.double())
        Qa, Ra = torch.linalg.qr(entry.A_RI.double().mT)
        U, S_K, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
        return Qb @ U, S_K, Qa @ Vh.mT
    M = entry.dense().double()
    if M.shape[-2] > M.shape[-1]:
        V, S_K, U = _svd_wide(M.mT)
        return U, S_K, V
    return _svd_wide(M)


def _svd_wide(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squares, U = torch.linalg.eigh(M @ M.mT)
    squares, U = squares.flip(-1), U.flip(-1)
    S_K = squares.clamp(min=0).sqrt()
    # U U^T M is the projection whatever the eigenvalues' own error; columns of nothing are left zero.
    safe = torch.where(S_K > 0, S_K, torch.ones_like(S_K))
    return U, S_K, (M.mT @ U) / safe.unsqueeze(-2)


def singular_values(entry: Entry) -> Tensor:
    """Of a matrix entry, descending, float64."""
    return svd(entry)[1]


def _rank_for(S_K: Tensor, energy: float) -> int:
    squares = S_K.square()
    kept = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    enough = (kept < energy - 1e-12).sum(-1) + 1
    return min(int(enough.max()), S_K.shape[-1])


def _converted(
    vector: PreferenceVector, convert: Callable[[Entry], Entry], *, form: str, dtype: str, **chosen: object
) -> PreferenceVector:
    loss = StorageLoss()
    entries: dict[str, Entry] = {}
    for name in vector.names():
        before = vector.entries[name]
        entries[name] = convert(before)
        if not is_finite(entries[name]):
            raise InputError(f"'{name}' of '{vector.info.preference}' overflows {dtype}; choose bfloat16 or float32")
        loss.update(name, before, entries[name])
    history = vector.info.precision.get("conversions", [])
    assert isinstance(history, list)
    step = {"form": form, "dtype": dtype, **chosen, **loss.report()}
    return vector.replace(
        entries, form=form, dtype=dtype, precision=vector.info.precision | {"conversions": [*history, step]}
    )

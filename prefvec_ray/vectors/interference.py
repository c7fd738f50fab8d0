"""Vectors changed to interfere less with each other: published ways to merge, each as one vector a preference.

Every function takes vectors of one base and gives as many, under the same names. What it makes is linear in the
coefficients, so it can be merged, steered, searched and served like any vector.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.algebra import Vectors, agreeing, derived, magnitude_threshold, trimmed
from prefvec_ray.vectors.entries import Entry, Full, LowRank
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.forms import svd

Parts = dict[str, dict[str, Entry]]


def ties_parts(vectors: Vectors, *, density: float) -> dict[str, PreferenceVector]:
    """TIES (arXiv 2306.01708, algorithm 1), taken apart: the parts sum to `ties` at coefficients of 1.

    Each vector is trimmed to its largest numbers. The sign of each number is elected once, at equal weights. A part
    keeps what agrees with it, divided by how many vectors agree. Full form.
    """
    thresholds = {key: magnitude_threshold(vector, density) for key, vector in vectors.items()}
    parts: Parts = {key: {} for key in vectors}
    for name, keys in _changing(vectors).items():
        terms = torch.stack([trimmed(vectors[key].dense(name), thresholds[key]) for key in keys])
        agree = agreeing(terms)
        kept = terms * agree / agree.sum(0).clamp(min=1)
        for key, values in zip(keys, kept, strict=True):
            parts[key][name] = Full(values)
    return _made(vectors, parts, {"method": "ties_parts", "density": density})


def orthogonal_parts(vectors: Vectors) -> dict[str, PreferenceVector]:
    """Vectors whose changes of each parameter are orthogonal to each other (Loewdin's symmetric orthogonalization).

    Per parameter, the changes are normed, replaced by the closest orthonormal set, and given their norms back. No
    vector is preferred, and their order does not matter. Full form.

    Raises:
        InputError: two vectors change a parameter in the same direction, so that no such set is near.
    """
    parts: Parts = {key: {} for key in vectors}
    for name, keys in _changing(vectors).items():
        dense = torch.stack([vectors[key].dense(name) for key in keys])
        flat_PN = dense.double().flatten(1)
        norm_P = flat_PN.norm(dim=1, keepdim=True)
        unit_PN = flat_PN / norm_P
        value_P, basis_PP = torch.linalg.eigh(unit_PN @ unit_PN.mT)
        if value_P[0] < 1e-6:
            raise InputError(f"'{name}' is changed in one direction by {', '.join(keys)}: nothing can be orthogonal")
        made_PN = norm_P * (basis_PP * value_P.rsqrt() @ basis_PP.mT @ unit_PN)
        for key, values in zip(keys, made_PN.float().view_as(dense), strict=True):
            parts[key][name] = Full(values)
    return _made(vectors, parts, {"method": "orthogonal_parts"})


def singular_parts(vectors: Vectors) -> dict[str, PreferenceVector]:
    """Task singular vectors (TSV-Merge, Gargiulo et al., arXiv 2412.00081, algorithm 1), taken apart.

    Per matrix, each vector keeps an equal share of the ranks. The left and the right singular vectors of all are made
    orthonormal together, as close as can be to what they were (Procrustes). Low-rank form; what is no single matrix
    stays as it is.
    """
    parts: Parts = {key: {} for key in vectors}
    for name, keys in _changing(vectors).items():
        entries = [vectors[key].entry(name) for key in keys]
        if len(entries[0].shape) != 2:
            parts |= {key: parts[key] | {name: Full(vectors[key].dense(name))} for key in keys}
            continue
        rank = max(1, min(entries[0].shape) // len(keys))
        found = [svd(entry) for entry in entries]
        kept = [min(rank, S_K.numel()) for _, S_K, _ in found]
        U_OR = _orthonormal(torch.cat([U[:, :k] for (U, _, _), k in zip(found, kept, strict=True)], dim=1))
        V_IR = _orthonormal(torch.cat([V[:, :k] for (_, _, V), k in zip(found, kept, strict=True)], dim=1))
        pieces = zip(keys, found, kept, U_OR.split(kept, 1), V_IR.split(kept, 1), strict=True)
        for key, (_, S_K, _), k, U, V in pieces:
            root = S_K[:k].sqrt()
            parts[key][name] = LowRank((V * root).mT.float().contiguous(), (U * root).float().contiguous())
    return _made(vectors, parts, {"method": "singular_parts"})


def _orthonormal(matrix: Tensor) -> Tensor:
    """The closest matrix with orthonormal columns."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def _changing(vectors: Vectors) -> dict[str, list[str]]:
    """Parameter -> the vectors that change it."""
    names = sorted({name for vector in vectors.values() for name in vector.names()})
    return {name: [key for key in sorted(vectors) if name in vectors[key]] for name in names}


def _made(
    vectors: Vectors, parts: Mapping[str, Mapping[str, Entry]], recipe: dict[str, object]
) -> dict[str, PreferenceVector]:
    return {
        key: derived(vectors, parts[key], vector.info.preference, torch.float32, recipe)
        for key, vector in vectors.items()
    }

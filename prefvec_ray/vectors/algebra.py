"""Arithmetic with preference vectors: the readable reference, and the methods that peers propose, each by its name.

`merge` is the definition that the fast paths (`LiveModel`, `export_model`, steering) are tested against. The other
functions take vectors and give a vector, so whatever they make can be merged, steered, stored and compared.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.entries import Entry, Full, added, form_of, scaled
from prefvec_ray.vectors.extract import check_same_base, stored_as
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.live import check_base, check_coefficients
from prefvec_ray.vectors.numbers import is_finite

Vectors = Mapping[str, PreferenceVector]
Coefficients = Mapping[str, float]


def merge(base: Mapping[str, Tensor], vectors: Vectors, coefficients: Coefficients) -> dict[str, Tensor]:
    """theta = theta_base + sum_p eta_p phi_p (arXiv 2504.20106, section 3.3) on a state dict under checkpoint names.

    Per parameter: base in fp32, then eta_p phi_p added in fp32 in the vectors' sorted order (so the caller's order
    cannot matter), then one rounding to the base's dtype. With every eta 0, or for parameters that no vector changes,
    the result is the base's own tensor. Raises InputError for unknown names, coefficients that are not finite, another
    base's vector, parameters that the base lacks or has in another shape, and results that are not finite.
    """
    eta = check_coefficients(coefficients, vectors)
    base_fingerprint = fingerprint(base)
    for key, vector in vectors.items():
        check_base(vector, base_fingerprint)
        for name in vector.names():
            if name not in base:
                raise InputError(f"vector '{key}' changes '{name}', which the base does not have")
            if base[name].shape != vector.shape(name):
                shapes = f"{tuple(vector.shape(name))}, in the base {tuple(base[name].shape)}"
                raise InputError(f"vector '{key}': '{name}' has shape {shapes}")
    merged = dict(base)
    active = {name: float(np.float32(eta[name])) for name in sorted(vectors) if eta[name]}
    for parameter in sorted({name for key in active for name in vectors[key].names()}):
        total = base[parameter].float()
        for key, factor in active.items():
            if parameter in vectors[key]:
                total = total + vectors[key].dense(parameter).to(total.device) * factor
        merged[parameter] = total.to(base[parameter].dtype)
        if not is_finite(merged[parameter]):
            raise InputError(f"coefficients {eta} make '{parameter}' infinite or NaN; choose smaller ones")
    return merged


def combine(
    vectors: Vectors, coefficients: Coefficients, *, preference: str, dtype: torch.dtype = torch.float32
) -> PreferenceVector:
    """sum_p eta_p phi_p as one vector (task arithmetic, arXiv 2212.04089). Low-rank entries stay exact; ranks add."""
    eta = check_coefficients(coefficients, vectors)
    entries: dict[str, Entry] = {}
    for key in sorted(vectors):
        for name in vectors[key].names() if eta[key] else []:
            term = scaled(vectors[key].entries[name], eta[key])
            entries[name] = added(entries[name], term) if name in entries else term
    return derived(vectors, entries, preference, dtype, {"method": "combine", "coefficients": dict(eta)})


def reward_soup(
    deltas: Vectors, weights: Coefficients, *, preference: str, dtype: torch.dtype = torch.float32
) -> PreferenceVector:
    """Rewarded soup (arXiv 2306.04488, equation 1): the convex combination of fine-tuned models, as one delta.

    `deltas` are runs' `theta_run - theta_base`. Raises InputError unless the weights are at least 0 and sum to 1.
    """
    eta = check_coefficients(weights, deltas)
    if min(eta.values()) < 0 or abs(sum(eta.values()) - 1) > 1e-6:
        raise InputError(f"a reward soup is a convex combination; weights {eta} must be >= 0 and sum to 1")
    return combine(deltas, eta, preference=preference, dtype=dtype)


def keep_largest(vector: PreferenceVector, density: float) -> PreferenceVector:
    """The share `density` of phi's numbers that is largest in magnitude, the rest 0 (TIES "trim", arXiv 2306.01708, 3).

    One threshold over the whole vector, as in the paper. Numbers equal to the threshold are all kept. Full form.
    """
    threshold = magnitude_threshold(vector, density)
    entries = {name: Full(trimmed(vector.dense(name), threshold)) for name in vector.names()}
    recipe = {"method": "keep_largest", "density": density}
    return derived({vector.info.preference: vector}, entries, vector.info.preference, torch.float32, recipe)


def dare(vector: PreferenceVector, density: float, *, seed: int) -> PreferenceVector:
    """Drop And REscale (arXiv 2311.03099, equation 2): keep each number with probability `density`, divide by it.

    The expectation is phi. The draw depends on the seed and the parameter's name alone, on CPU.
    """
    _check_density(density)
    entries: dict[str, Entry] = {}
    for name in vector.names():
        number = int.from_bytes(blake3(f"{seed} {name}".encode()).digest(7), "big")
        dense = vector.dense(name)
        mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(number)) < density
        entries[name] = Full(dense * mask / density)
    recipe = {"method": "dare", "density": density, "seed": seed}
    return derived({vector.info.preference: vector}, entries, vector.info.preference, torch.float32, recipe)


def ties(vectors: Vectors, coefficients: Coefficients, *, density: float, preference: str) -> PreferenceVector:
    """TIES (arXiv 2306.01708, algorithm 1): trim each vector, elect a sign per number, average those that agree.

    The trimmed vectors are weighted by their coefficients before the election; with all coefficients 1 this is the
    paper's own tau_m, and its lambda is the coefficient that the result is merged with. The average is over the vectors
    that agree with the elected sign and are not trimmed there.
    """
    eta = check_coefficients(coefficients, vectors)
    thresholds = {key: magnitude_threshold(vectors[key], density) for key in sorted(vectors) if eta[key]}
    entries: dict[str, Entry] = {}
    for name in sorted({name for key in thresholds for name in vectors[key].names()}):
        terms = torch.stack(
            [
                trimmed(vectors[key].dense(name), threshold) * eta[key]
                for key, threshold in thresholds.items()
                if name in vectors[key]
            ]
        )
        agree = agreeing(terms)
        entries[name] = Full((terms * agree).sum(0) / agree.sum(0).clamp(min=1))
    recipe = {"method": "ties", "density": density, "coefficients": dict(eta)}
    return derived(vectors, entries, preference, torch.float32, recipe)


def magnitude_threshold(vector: PreferenceVector, density: float) -> float:
    """The magnitude of the ceil(density * count)-th largest number of the entries, exactly, in two passes.

    Positive fp32 numbers sort as their bits do: one histogram of the high 16 bits finds the bucket, one of the low 16
    bits the number, so nothing of the model's size is held.
    """
    _check_density(density)
    names = vector.names()
    count = sum(vector.shape(name).numel() for name in names)
    wanted = int(np.ceil(density * count))
    high, above = _from_the_top((_bits(vector, name) >> 16 for name in names), wanted)
    low, _ = _from_the_top(
        (bits[bits >> 16 == high] & 0xFFFF for bits in (_bits(vector, name) for name in names)),
        wanted - above,
    )
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bits(vector: PreferenceVector, name: str) -> Tensor:
    return vector.dense(name).abs().flatten().view(torch.int32)


def _from_the_top(chunks: Iterable[Tensor], wanted: int) -> tuple[int, int]:
    """The 16-bit value at which `wanted` numbers are reached from the largest down, and how many lie above it."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks:
        counts += torch.bincount(chunk, minlength=1 << 16)
    reached = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(reached, wanted))
    return (1 << 16) - 1 - position, int(reached[position - 1]) if position else 0


def agreeing(terms: Tensor) -> Tensor:
    """Which numbers of the terms (first dimension: the vectors) have the sign that TIES elects, that of their sum."""
    return (terms.sign() == terms.sum(0).sign()) & (terms != 0)


def trimmed(dense: Tensor, threshold: float) -> Tensor:
    return torch.where(dense.abs() >= threshold, dense, torch.zeros_like(dense))


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; expected the share of numbers to keep, in (0, 1]")


def derived(
    vectors: Vectors,
    entries: Mapping[str, Entry],
    preference: str,
    dtype: torch.dtype,
    recipe: dict[str, object],
) -> PreferenceVector:
    """A vector whose parents are the vectors it was made of."""
    sources = list(vectors.values())
    if not sources:
        raise InputError("there is no vector to combine; give at least one")
    check_same_base(sources)
    info = sources[0].info.model_validate(
        sources[0].info.model_dump()
        | {
            "preference": preference,
            "form": form_of(entries),
            "dtype": "float32",
            "parents": {key: vector.digest() for key, vector in vectors.items()},
            "data_digest": sources[0].info.data_digest if len({v.info.data_digest for v in sources}) == 1 else "",
            "recipe": recipe,
            "precision": {},
        }
    )
    return stored_as(info, entries, dtype)

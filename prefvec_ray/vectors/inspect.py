"""What is in a preference vector: where it acts, how low its rank is, and how it relates to others.

    summary = inspect({"helpful": helpful, "harmless": harmless})
    summary.cosines["helpful", "harmless"], summary.energy_by_rank["helpful"][8]
    plot(summary, "vectors.png")

Low-rank vectors are never multiplied out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.vectors.entries import Entry, LowRank
from prefvec_ray.vectors.extract import check_same_base
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.forms import singular_values

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Summary:
    """Everything by vector name. Norms are Frobenius norms, shares are of |phi|^2."""

    norms: dict[str, float]
    layer_norms: dict[str, dict[str, float]]
    """layer number, or the parameter's own name outside of layers -> norm"""
    cosines: dict[tuple[str, str], float]
    effective_ranks: dict[str, dict[str, float]]
    """matrix -> effective rank"""
    energy_by_rank: dict[str, dict[int, float]]
    """rank -> share of |phi|^2 that remains when every matrix is cut to it (other entries are kept)"""


def inspect(vectors: Mapping[str, PreferenceVector], *, ranks: Sequence[int] = RANKS) -> Summary:
    """Norms, cosines and ranks of vectors of one base; one SVD a matrix. Raises InputError for two bases."""
    if not vectors:
        raise InputError("there is no vector to inspect; give at least one")
    check_same_base(list(vectors.values()))
    spectra = {key: spectrum(vector) for key, vector in vectors.items()}
    return Summary(
        norms={key: norm(vector) for key, vector in vectors.items()},
        layer_norms={key: layer_norms(vector) for key, vector in vectors.items()},
        cosines={(a, b): cosine(vectors[a], vectors[b]) for a in vectors for b in vectors},
        effective_ranks={
            key: {name: effective_rank(values) for name, values in matrices.items()}
            for key, matrices in spectra.items()
        },
        energy_by_rank={key: _kept(vectors[key], matrices, ranks) for key, matrices in spectra.items()},
    )


def norm(vector: PreferenceVector) -> float:
    """|phi| over all parameters."""
    return math.sqrt(sum(vector.entries[name].squared_norm() for name in vector.names()))


def layer_norms(vector: PreferenceVector) -> dict[str, float]:
    """|phi| per layer, in the model's order; what lies outside of numbered layers stands under its own name."""
    squares: dict[str, float] = {}
    for name in vector.names():
        found = LAYER.search(name)
        key = found.group(1) if found else name
        squares[key] = squares.get(key, 0.0) + vector.entries[name].squared_norm()
    ordered = sorted(squares, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))
    return {key: math.sqrt(squares[key]) for key in ordered}


def inner(left: PreferenceVector, right: PreferenceVector) -> float:
    """<phi, psi> over all parameters in float64; a parameter that only one vector changes adds nothing."""
    shared = [name for name in left.names() if name in right]
    return sum(_inner(left.entries[name], right.entries[name]) for name in shared)


def cosine(left: PreferenceVector, right: PreferenceVector) -> float:
    """cos of the angle between two vectors of one base, over all parameters."""
    check_same_base([left, right])
    return inner(left, right) / (norm(left) * norm(right))


def spectrum(vector: PreferenceVector) -> dict[str, Tensor]:
    """Matrix (or stack of matrices) -> its singular values, descending, float64."""
    return {name: singular_values(vector.entries[name]) for name in vector.names() if len(vector.shape(name)) >= 2}


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, EUSIPCO 2007); of a stack, the mean."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp().mean().item()


def _kept(vector: PreferenceVector, matrices: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[int, float]:
    rest = sum(vector.entries[name].squared_norm() for name in vector.names() if name not in matrices)
    total = rest + sum(values.square().sum().item() for values in matrices.values())
    return {
        rank: (rest + sum(values[..., :rank].square().sum().item() for values in matrices.values())) / total
        for rank in ranks
    }


def _inner(left: Entry, right: Entry) -> float:
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        B = left.B_OR.double().mT @ right.B_OR.double()
        return (B * (left.A_RI.double() @ right.A_RI.double().mT)).sum().item()
    return (left.dense().double() * right.dense().double()).sum().item()


def plot(summary: Summary, path: str | Path) -> Path:
    """Three panels: norm per layer, energy by rank, cosines. The file's suffix chooses the format (png, svg, pdf)."""
    require("report", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(summary.norms)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    layers, energy, cosines = figure.subplots(1, 3)
    for name in names:
        numbered = {key: value for key, value in summary.layer_norms[name].items() if key.isdigit()}
        layers.plot([int(key) for key in numbered], list(numbered.values()), marker="o", label=name)
        energy.plot(
            list(summary.energy_by_rank[name]), list(summary.energy_by_rank[name].values()), marker="o", label=name
        )
    layers.set(xlabel="layer", ylabel="|phi|", title="where the vectors act")
    layers.set_ylim(bottom=0)
    energy.set(xlabel="rank kept", ylabel="share of |phi|²", title="energy by rank", ylim=(0, 1.02))
    energy.set_xscale("log", base=2)
    energy.xaxis.set_major_formatter("{x:.0f}")
    table = [[summary.cosines[a, b] for b in names] for a in names]
    cosines.imshow(table, vmin=-1, vmax=1, cmap="RdBu")
    cosines.set(xticks=range(len(names)), yticks=range(len(names)), title="cosines")
    cosines.set_xticklabels(names)
    cosines.set_yticklabels(names)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            cosines.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    for axes in (layers, energy):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    return Path(path)

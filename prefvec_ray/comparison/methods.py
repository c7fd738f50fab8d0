"""The methods: each makes vectors of what one seed of a training job left, and says how they may be combined.

A method is searched over *parameters*, each in a range that holds 0. All parameters at 0 are the base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from prefvec_ray.artifacts.training import MIXED, Polarity
from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.vectors import PreferenceVector, dare, depth_profile, load_vector, split, to_low_rank
from prefvec_ray.vectors.interference import orthogonal_parts, singular_parts, ties_parts

Parameters = Mapping[str, float]
Ranges = dict[str, tuple[float, float]]

UP_TO = 2.0
"""The largest coefficient of a contrast vector: well beyond where the tiny world's text falls apart, so that the limits
and not the ranges decide."""
TIES_DENSITY = 0.2
"""The paper's default (arXiv 2306.01708, section 4)."""
DARE_DENSITY = 0.2
RANK = 8
DEPTHS = 3
TILT = "tilt"


class Sources:
    """The vectors of one seed: phi and the positive run's delta of every preference, and the mixed run's."""

    def __init__(self, run: TrainingRun, seed: int) -> None:
        self.run, self.seed, self.folders = run, seed, run.vectors(seed)
        self.preferences = run.preferences

    @cached_property
    def contrast(self) -> dict[str, PreferenceVector]:
        return {p: load_vector(self.folders[p]) for p in self.preferences}

    @cached_property
    def positive(self) -> dict[str, PreferenceVector]:
        return {p: load_vector(self.folders[f"{p}+"]) for p in self.preferences}

    @property
    def mixed(self) -> PreferenceVector:
        return load_vector(self.folders[MIXED])

    @cached_property
    def digests(self) -> dict[str, str]:
        return {name: load_vector(folder).digest() for name, folder in self.folders.items()}

    def needed(self, method: str) -> list[str]:
        """The vectors that a method is made of; InputError where the job has not trained one."""
        trained = {run.spec.polarity for run in self.run.summary.runs if run.spec.preference != MIXED}
        if "negative" in METHODS[method].trains and "negative" not in trained:
            raise InputError(
                f"{self.run.folder} has positive runs alone: train with polarity: both, or leave out {method!r}"
            )
        if METHODS[method].trains:
            return [name for name in self.folders if name != MIXED]
        if MIXED not in self.folders:
            raise InputError(f"{self.run.folder} has no mixed run: train with mixed: true, or leave out {method!r}")
        return [MIXED]


@dataclass(frozen=True)
class Prepared:
    """One method on one seed: vectors, what is searched, and how parameters become coefficients of the vectors."""

    vectors: dict[str, PreferenceVector]
    ranges: Ranges
    coefficients: Callable[[Parameters], dict[str, float]] = dict


@dataclass(frozen=True)
class MergeMethod:
    """`title` says all that its results depend on: constants and ranges included."""

    title: str
    trains: tuple[Polarity, ...]
    """The runs of each preference that it needs; none for a run on the mixed data."""
    prepare: Callable[[Sources], Prepared]


def _upto(high: float, names: list[str]) -> Ranges:
    return dict.fromkeys(names, (0.0, high))


def _contrast(sources: Sources) -> Prepared:
    return Prepared(sources.contrast, _upto(UP_TO, sources.preferences))


def _positives(sources: Sources) -> Prepared:
    return Prepared(sources.positive, _upto(2 * UP_TO, sources.preferences))


def _negatives(sources: Sources) -> Prepared:
    """-(theta- - base) = phi - (theta+ - base), so both vectors of a preference are in the model."""

    def coefficients(parameters: Parameters) -> dict[str, float]:
        return {**parameters, **{f"{p}+": -eta for p, eta in parameters.items()}}

    both = sources.contrast | {f"{p}+": vector for p, vector in sources.positive.items()}
    return Prepared(both, _upto(2 * UP_TO, sources.preferences), coefficients)


def _mixed(sources: Sources) -> Prepared:
    return Prepared({MIXED: sources.mixed}, _upto(2 * UP_TO, [MIXED]))


def _soup(sources: Sources) -> Prepared:
    """Weights are the parameters over their sum: a convex combination of the positive runs."""

    def coefficients(parameters: Parameters) -> dict[str, float]:
        total = sum(parameters.values())
        return {p: weight / total if total else 0.0 for p, weight in parameters.items()}

    return Prepared(sources.positive, _upto(1.0, sources.preferences), coefficients)


def _ties(sources: Sources) -> Prepared:
    return Prepared(ties_parts(sources.contrast, density=TIES_DENSITY), _upto(2 * UP_TO, sources.preferences))


def _dare(sources: Sources) -> Prepared:
    made = {p: dare(vector, DARE_DENSITY, seed=sources.seed) for p, vector in sources.contrast.items()}
    return Prepared(made, _upto(UP_TO, sources.preferences))


def _orthogonal(sources: Sources) -> Prepared:
    return Prepared(orthogonal_parts(sources.contrast), _upto(UP_TO, sources.preferences))


def _orthogonal_positives(sources: Sources) -> Prepared:
    return Prepared(orthogonal_parts(sources.positive), _upto(2 * UP_TO, sources.preferences))


def _singular(sources: Sources) -> Prepared:
    return Prepared(singular_parts(sources.contrast), _upto(UP_TO, sources.preferences))


def _low_rank(sources: Sources) -> Prepared:
    made = {p: to_low_rank(vector, rank=RANK) for p, vector in sources.contrast.items()}
    return Prepared(made, _upto(UP_TO, sources.preferences))


def _depth(sources: Sources) -> Prepared:
    """One more parameter, the tilt of a depth profile that all preferences share."""
    parts = {p: split(vector, f"depth:{DEPTHS}") for p, vector in sources.contrast.items()}

    def coefficients(parameters: Parameters) -> dict[str, float]:
        factors = depth_profile(DEPTHS, parameters[TILT])
        pairs = {p: zip(parts[p], factors, strict=True) for p in sources.preferences}
        return {f"{p}.{label}": parameters[p] * factor for p in pairs for label, factor in pairs[p]}

    vectors = {f"{p}.{label}": part for p in parts for label, part in parts[p].items()}
    return Prepared(vectors, {**_upto(UP_TO, sources.preferences), TILT: (-1.0, 1.0)}, coefficients)


BOTH: tuple[Polarity, ...] = ("positive", "negative")

METHODS: dict[str, MergeMethod] = {
    "contrast": MergeMethod(f"contrast vectors, 0 to {UP_TO:g} (the paper)", BOTH, _contrast),
    "positives": MergeMethod(f"positive runs alone, 0 to {2 * UP_TO:g}", ("positive",), _positives),
    "negatives": MergeMethod(f"negative runs alone, 0 to -{2 * UP_TO:g}", ("negative",), _negatives),
    "mixed": MergeMethod(f"one run on the mixed data, 0 to {2 * UP_TO:g}", (), _mixed),
    "soup": MergeMethod("rewarded soup: weights that sum to 1", ("positive",), _soup),
    "ties": MergeMethod(f"TIES, {TIES_DENSITY:.0%} kept, signs elected once, 0 to {2 * UP_TO:g}", BOTH, _ties),
    "dare": MergeMethod(f"DARE, {DARE_DENSITY:.0%} kept, 0 to {UP_TO:g}", BOTH, _dare),
    "orthogonal": MergeMethod(f"orthogonal in each parameter, 0 to {UP_TO:g}", BOTH, _orthogonal),
    "orthogonal-positives": MergeMethod(
        f"positive runs alone, orthogonal in each parameter, 0 to {2 * UP_TO:g}", ("positive",), _orthogonal_positives
    ),
    "singular": MergeMethod(f"task singular vectors, 0 to {UP_TO:g}", BOTH, _singular),
    "rank": MergeMethod(f"rank {RANK}, 0 to {UP_TO:g}", BOTH, _low_rank),
    "depth": MergeMethod(f"depth profile of {DEPTHS} parts, tilt -1 to 1, 0 to {UP_TO:g}", BOTH, _depth),
}

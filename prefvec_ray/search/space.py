"""The space of coefficients: which settings are the same one, and where between known ones there is most to learn."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prefvec_ray.search.options import Bounds
from prefvec_ray.search.pareto import Point

NEAR = 0.02
"""Two settings whose coefficients all differ by less than this share of their ranges are one: no number of answers that
a search affords tells them apart."""

Setting = Mapping[str, float]


class Space:
    """Settings within some ranges. Distances are the largest difference of a coefficient, as a share of its range."""

    def __init__(self, bounds: Bounds, seed: int) -> None:
        self.bounds, self._seed = bounds, seed
        self._low = np.array([low for low, _ in bounds.values()])
        self._width = np.array([high - low for low, high in bounds.values()])

    def rounded(self, setting: Setting) -> dict[str, float]:
        """The setting in round numbers: at most half a hundredth of each range away, and within it."""
        found = {}
        for name, (low, high) in self.bounds.items():
            digits = 1 - math.floor(math.log10((high - low) / 2))
            found[name] = min(max(round(setting[name], digits + 1), low), high) + 0.0  # no -0.0
        return found

    def units(self, settings: Sequence[Setting]) -> NDArray[np.float64]:
        """Coefficients as shares of their ranges, in [0, 1]: one row a setting."""
        rows = [[setting[name] for name in self.bounds] for setting in settings]
        return (np.array(rows).reshape(-1, len(self.bounds)) - self._low) / self._width

    def at(self, units: NDArray[np.float64]) -> dict[str, float]:
        """The setting in round numbers whose coefficients are these shares of their ranges."""
        return self.rounded(dict(zip(self.bounds, (self._low + self._width * units).tolist(), strict=True)))

    def near(self, setting: Setting, others: Iterable[Setting]) -> bool:
        """Whether one of the others is the same setting."""
        return self._distance(setting, list(others)) < NEAR

    def between(self, front: Sequence[tuple[Setting, Point]], known: Sequence[Setting]) -> dict[str, float]:
        """A setting unlike any of `known`, where the front is least sure: in the middle between two neighbours on it
        whose scores lie furthest apart. Where there is no such middle, the one of some random settings that is
        furthest from all that are known.

        Args:
            front: settings on the front, each with its gains.
        """
        for a, b in _neighbours([point for _, point in front]):
            middle = self.rounded({name: (front[a][0][name] + front[b][0][name]) / 2 for name in self.bounds})
            if not self.near(middle, known):
                return middle
        some = self.spread(64, skip=len(known))
        best = max(map(self.rounded, some), key=lambda point: self._distance(point, known))
        # Where every round number is taken, others are left.
        return best if self._distance(best, known) else max(some, key=lambda point: self._distance(point, known))

    def spread(self, count: int, skip: int = 0) -> list[dict[str, float]]:
        """Settings that fill the ranges evenly: scrambled Sobol points, better than as many random ones."""
        engine = torch.quasirandom.SobolEngine(len(self.bounds), scramble=True, seed=self._seed)
        units = engine.fast_forward(skip).draw(count, dtype=torch.float64).numpy()
        return [dict(zip(self.bounds, row.tolist(), strict=True)) for row in self._low + self._width * units]

    def _distance(self, setting: Setting, others: Sequence[Setting]) -> float:
        """To the nearest of the others."""
        if not others:
            return math.inf
        rows = np.array([[other[name] for name in self.bounds] for other in others])
        here = np.array([setting[name] for name in self.bounds])
        return float((np.abs(rows - here) / self._width).max(-1).min())


def _neighbours(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Pairs of points with no third one between them, those furthest apart first. Each objective counts as a share of
    its spread."""
    if len(points) < 2:
        return []
    gains_SO = np.array(points)
    spread_O = np.ptp(gains_SO, axis=0)
    scaled_SO = gains_SO / np.where(spread_O > 0, spread_O, 1.0)
    apart_SS = np.linalg.norm(scaled_SO[:, None] - scaled_SO[None], axis=-1)
    pairs = []
    for a, b in itertools.combinations(range(len(points)), 2):
        others = np.delete(np.maximum(apart_SS[a], apart_SS[b]), [a, b])
        if (others >= apart_SS[a, b]).all():
            pairs.append((a, b))
    return sorted(pairs, key=lambda pair: -apart_SS[pair])

"""Fronts: which points are not dominated, how much they dominate, and which one to recommend. Plain Python,
no Ray.

All functions take points as *gains*: one tuple of objectives a point, larger is better in each.
"""

import math
from collections.abc import Sequence

Point = tuple[float, ...]


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good as `b` everywhere and better somewhere."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, in order; of equal points, the first. Points with NaN
    are left out."""
    kept = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    return [
        i for i in kept if not any(dominates(points[j], points[i]) or (j < i and points[j] == points[i]) for j in kept)
    ]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume that the points dominate above `reference`; exact, by WFG (While et al., IEEE TEVC 2012).

    Points count where they exceed the reference in every objective. Meant for fronts of up to a hundred
    points or so.
    """
    lengths = [tuple(x - r for x, r in zip(point, reference, strict=True)) for point in points]
    return _volume([point for point in lengths if all(x > 0 for x in point)])


class Volume:
    """A hypervolume that grows point by point, for the price of what each point adds."""

    def __init__(self, reference: Point) -> None:
        self.reference, self.value, self._front = reference, 0.0, list[Point]()

    def add(self, point: Point) -> float:
        """The hypervolume with `point`."""
        box = tuple(x - r for x, r in zip(point, self.reference, strict=True))
        if any(x <= 0 for x in box) or any(all(x >= y for x, y in zip(p, box, strict=True)) for p in self._front):
            return self.value
        self.value += _added(box, self._front)
        self._front = [p for p in self._front if not dominates(box, p)] + [box]
        return self.value


def _added(box: Point, others: Sequence[Point]) -> float:
    """A box, less what `others` cover of it."""
    return math.prod(box) - _volume([tuple(map(min, box, other)) for other in others])


def _volume(points: list[Point]) -> float:
    front = sorted((points[i] for i in non_dominated(points)), reverse=True)
    return sum(_added(point, front[i + 1 :]) for i, point in enumerate(front))


def compromise(points: Sequence[Point], base: Point) -> tuple[int, tuple[float, ...]] | None:
    """The point whose least gain over `base` is largest, gains measured in units of the best gain any point
    has in that objective; its index and those shares. None for no points.

    This is the Kalai–Smorodinsky solution (Econometrica 43, 1975) on the points at hand, with the base as
    what each objective falls back to: it needs no weights, does not change when an objective is rescaled,
    and gives up the same share of what each objective could have had. An objective in which no point beats
    the base counts with its plain gain.
    """
    if not points:
        return None
    gains = [tuple(x - b for x, b in zip(point, base, strict=True)) for point in points]
    best = [max(column) for column in zip(*gains, strict=True)]
    shares = [tuple(g / top if top > 0 else g for g, top in zip(gain, best, strict=True)) for gain in gains]
    # Among equal least shares, the larger sum: otherwise a tie would fall to the order of the trials.
    index = max(range(len(points)), key=lambda i: (min(shares[i]), sum(shares[i])))
    return index, shares[index]

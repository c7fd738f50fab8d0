import itertools
import math
import random

import pytest

from prefvec_ray.search import hypervolume


def test_a_hypervolume_one_can_draw():
    assert hypervolume([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (1.0, 1.0)], (0.0, 0.0)) == 6.0
    assert hypervolume([(1.0, 3.0), (-1.0, 9.0)], (0.0, 0.0)) == 3.0, "points below the reference add nothing"
    assert hypervolume([], (0.0, 0.0)) == 0.0


def by_inclusion_and_exclusion(points, reference):
    """The measure of a union of boxes, from those of all their intersections."""
    boxes = [tuple(x - r for x, r in zip(point, reference, strict=True)) for point in points]
    boxes = [box for box in boxes if min(box) > 0]
    return sum(
        (-1) ** (size + 1) * math.prod(map(min, zip(*some, strict=True)))
        for size in range(1, len(boxes) + 1)
        for some in itertools.combinations(boxes, size)
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 6])
def test_hypervolumes_are_exact(dimensions):
    rng = random.Random(dimensions)
    points = [tuple(rng.random() for _ in range(dimensions)) for _ in range(12)]
    points += [points[0], tuple(x / 2 for x in points[1])]
    reference = (0.2,) * dimensions
    assert hypervolume(points, reference) == pytest.approx(by_inclusion_and_exclusion(points, reference), abs=1e-12)

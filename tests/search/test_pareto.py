import itertools
import math
import random

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from prefvec_ray.search import compromise, hypervolume, non_dominated


def test_what_no_other_point_beats_is_on_the_front():
    points = [(1.0, 5.0), (3.0, 3.0), (2.0, 2.0), (5.0, 1.0), (3.0, 3.0), (1.0, 4.0), (math.nan, 9.0)]
    assert non_dominated(points) == [0, 1, 3], "of equal points the first, and never NaN"
    assert non_dominated([]) == []


def test_a_hypervolume_one_can_draw():
    assert hypervolume([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (1.0, 1.0)], (0.0, 0.0)) == 6.0
    assert hypervolume([(1.0, 3.0), (-1.0, 9.0)], (0.0, 0.0)) == 3.0, "points below the reference add nothing"
    assert hypervolume([], (0.0, 0.0)) == 0.0


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 6])
def test_hypervolume_agrees_with_optunas(dimensions):
    rng = random.Random(dimensions)
    points = [tuple(rng.random() for _ in range(dimensions)) for _ in range(12)]
    reference = (0.2,) * dimensions
    # Optuna minimizes, and takes no points below the reference: clipped ones span nothing.
    theirs = compute_hypervolume(-np.maximum(points, reference), -np.array(reference))
    assert hypervolume(points, reference) == pytest.approx(theirs)


def test_the_compromise_gives_up_the_same_share_of_every_objective():
    # From the base (0, 0), objective 1 could gain 1.0 and objective 2 could gain 0.1.
    points = [(1.0, 0.0), (0.6, 0.05), (0.4, 0.07), (0.0, 0.1)]
    assert compromise(points, (0.0, 0.0)) == (1, (0.6, 0.5))
    scaled = [(100 * a + 7, b) for a, b in points]
    assert compromise(scaled, (7.0, 0.0))[0] == 1, "other units, same choice"
    for order in itertools.permutations(points):
        assert order[compromise(order, (0.0, 0.0))[0]] == (0.6, 0.05)


def test_the_compromise_where_nothing_gains():
    assert compromise([], (0.0, 0.0)) is None
    index, shares = compromise([(-0.5, 0.2), (0.0, 0.0)], (0.0, 0.0))
    assert (index, shares) == (1, (0.0, 0.0))

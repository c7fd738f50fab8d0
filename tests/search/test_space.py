import itertools

import pytest

from prefvec_ray.search.space import NEAR, Space

SPACE = Space({"a": (-1.0, 1.0), "b": (0.0, 0.5)}, seed=0)


def test_settings_are_rounded_within_their_ranges():
    assert SPACE.rounded({"a": 0.333333, "b": 0.123456}) == {"a": 0.33, "b": 0.123}
    assert SPACE.rounded({"a": -0.001, "b": 0.49999}) == {"a": 0.0, "b": 0.5}
    assert Space({"a": (0.0, 1 / 3)}, seed=0).rounded({"a": 1 / 3}) == {"a": 0.333}
    assert str(SPACE.rounded({"a": -0.001, "b": 0.0})["a"]) == "0.0", "not -0.0"


def test_settings_as_shares_of_their_ranges_and_back():
    settings = [{"a": -1.0, "b": 0.5}, {"a": 0.5, "b": 0.1}]
    units = SPACE.units(settings)
    assert units.tolist() == [[0.0, 1.0], [0.75, 0.2]]
    assert [SPACE.at(row) for row in units] == settings
    assert SPACE.units([]).shape == (0, 2)


def test_near_is_a_share_of_each_range():
    assert SPACE.near({"a": 0.5, "b": 0.2}, [{"a": 0.53, "b": 0.205}])
    assert not SPACE.near({"a": 0.5, "b": 0.2}, [{"a": 0.53, "b": 0.22}])
    assert not SPACE.near({"a": 0.5, "b": 0.2}, [])


def test_the_widest_gap_of_the_front_is_filled_first():
    front = [({"a": a, "b": 0.25}, (a, help)) for a, help in ((-1.0, 1.0), (-0.9, 0.9), (0.7, 0.2), (1.0, 0.0))]
    known = [setting for setting, _ in front]
    assert SPACE.between(front, known) == {"a": -0.1, "b": 0.25}
    assert SPACE.between(front, [*known, {"a": -0.1, "b": 0.25}]) == {"a": 0.85, "b": 0.25}


@pytest.mark.parametrize("front", [[], [({"a": 0.0, "b": 0.0}, (0.5, 0.5))]])
def test_without_a_gap_it_is_far_from_all_that_is_known(front):
    known = [{"a": 0.0, "b": 0.0}]
    for _ in range(20):
        known.append(SPACE.between(front, known))
    apart = [
        max(abs(one["a"] - other["a"]) / 2, abs(one["b"] - other["b"]) / 0.5)
        for one, other in itertools.combinations(known, 2)
    ]
    assert min(apart) > 3 * NEAR


def test_where_every_round_number_is_known_it_is_another():
    space = Space({"a": (-1.0, 1.0)}, seed=0)
    known = [{"a": value / 100} for value in range(-100, 101)]
    assert space.between([], known) not in known

import itertools

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import baselines, grid, vector_settings


def test_two_preferences_have_every_baseline_of_the_table():
    found = {setting.name: setting.coefficients for setting in baselines(["helpful", "harmless"])}
    assert found == {
        "base": {},
        "DPO helpful+": {"helpful+": 1.0},
        "DPO harmless+": {"harmless+": 1.0},
        "DPO mixed": {"mixed": 1.0},
        "mixed × 2": {"mixed": 2.0},
        "reward soup": {"helpful+": 0.5, "harmless+": 0.5},
        "positives × 2": {"helpful+": 2.0, "harmless+": 2.0},
    }
    names = [setting.name for setting in vector_settings(["helpful", "harmless"])]
    assert names == ["vectors (0.5, 0.5)", "vectors (1, 1)", "vectors (1, 0.5)", "vectors (0.5, 1)"]


@pytest.mark.parametrize("count", range(1, 7))
def test_one_to_six_preferences(count):
    names = ["abcdef"[i] for i in range(count)]
    settings = [*baselines(names), *vector_settings(names)]
    assert len({setting.name for setting in settings}) == len(settings)
    soup = [setting for setting in settings if setting.kind == "soup"]
    assert all(sum(s.coefficients.values()) == pytest.approx(1) for s in soup)
    points = [tuple(point[name] for name in names) for point in grid(names)]
    assert len(set(points)) == len(points)
    planes = count * (count - 1) // 2
    assert len(points) == {1: 5, 2: 25}.get(count, planes * 16 + count * 4 + 1)
    if count > 2:
        assert all(sum(value != 0 for value in point) <= 2 for point in points)


def test_a_grid_of_two_is_full():
    values = (-1.0, 0.0, 1.0)
    assert [tuple(p.values()) for p in grid(["a", "b"], steps=3)] == list(itertools.product(values, values))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines([]), "0 preferences"),
        (lambda: baselines(list("abcdefg")), "7 preferences"),
        (lambda: vector_settings(["a", "a"]), "twice"),
        (lambda: grid(["a"], steps=1), "at least 2 steps"),
        (lambda: grid(list("abc"), low=0.5), "planes through 0"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(InputError, match=message):
        call()

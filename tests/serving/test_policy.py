"""What a caller may ask for, and what an operator may write."""

from dataclasses import dataclass

import pytest

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.policy import Policy, PreferenceError, no_way_around, policy_of
from prefvec_ray.serving.config import Range, ServingConfig

POLICY = Policy({"helpful": Range(), "harmless": Range(min=0.2, max=1, default=0.5)})


def config(**settings) -> ServingConfig:
    given = {"model": "tiny", "base": "base", "registry": "registry"} | settings
    return parse_config(given, ServingConfig, source="serve.yaml")


def test_names_left_out_get_the_operators_default_and_the_order_is_fixed():
    assert POLICY.coefficients({}) == (("harmless", 0.5), ("helpful", 0.0))
    assert POLICY.coefficients({"helpful": 1, "harmless": 0.2}) == (("harmless", 0.2), ("helpful", 1.0))


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"harmles": 1.0}, "unknown_preference", "served here: harmless, helpful"),
        ({"harmless": 0.19}, "preference_out_of_range", r"outside the allowed range \[0.2, 1\]"),
        ({"helpful": 1.0001}, "preference_out_of_range", r"outside the allowed range \[-1, 1\]"),
        ({"helpful": float("nan")}, "invalid_preference", "not a finite number"),
        ({"helpful": float("-inf")}, "invalid_preference", "not a finite number"),
    ],
)
def test_what_is_outside_is_refused_by_name_and_never_clamped(asked, code, says):
    with pytest.raises(PreferenceError, match=says) as caught:
        POLICY.coefficients(asked)
    assert (caught.value.code, caught.value.preference) == (code, next(iter(asked)))


def test_a_floor_under_a_misspelt_name_is_an_error():
    with pytest.raises(InputError, match="'harmles' not among the served preferences"):
        policy_of(config(ranges={"harmles": {"min": 0}}), ["helpful", "harmless"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ranges": {"harmless": {"min": 0.5}}}, "a range without 0 needs a default"),
        ({"ranges": {"harmless": {"min": 1, "max": -1}}}, "min <= default <= max"),
        ({"ranges": {"harmless": {"min": float("nan")}}}, "finite"),
        ({"engine": {"mode": "magic"}}, "engine.mode"),
        ({"engine": {"modes": "merged"}}, "unknown setting 'engine.modes'"),
        ({"replicas": {"min": 2, "max": 1}}, "min <= max"),
        ({"model": "tiny@x"}, "model"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_clear_line(settings, says):
    with pytest.raises(InputError, match=says) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Vector:
    """What `no_way_around` looks at."""

    digest: str
    preference: str


@pytest.mark.parametrize(
    "other", ["harmless+", "Harmless", "harm-less", "harm1ess", "harmIess", "h.armless", "HARMLE55"]
)
def test_a_look_alike_beside_a_floor_is_refused(other):
    vectors = {"harmless": Vector("a", "harmless"), "kind": Vector("b", other)}
    with pytest.raises(InputError, match="'kind' would be a way around the floor"):
        no_way_around({"harmless": 0}, vectors)
    no_way_around({}, vectors)


@pytest.mark.parametrize("other", ["harmless ", "harm\u200bless", "ｈarmless", "hаrmless", ""])
def test_a_vector_whose_preference_is_no_name_is_refused_beside_a_floor(other):
    with pytest.raises(InputError, match="expected 1 to 64 ASCII letters"):
        no_way_around({"harmless": 0}, {"harmless": Vector("a", "harmless"), "kind": Vector("b", other)})
    no_way_around({"harmless": 0}, {"harmless": Vector("a", "harmless"), "helpful": Vector("b", "helpful")})

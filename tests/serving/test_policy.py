"""What a caller may ask for, and what an operator may write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.keys import Key
from prefvec_ray.serving.access.policy import Policy, PreferenceError, no_way_around, parts_of, policy_for, policy_of
from prefvec_ray.serving.config import Range, ServingConfig

POLICY = Policy({"helpful": Range(), "harmless": Range(min=0.2, max=1, default=0.5)})


@dataclass(frozen=True)
class Vector:
    """What is looked at of a version of a vector in the registry."""

    digest: str
    preference: str
    parents: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def config(**settings: Any) -> ServingConfig:
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


PARTS = {"helpful": ("helpful.attention", "helpful.mlp", "helpful.other")}
SPLIT = Policy({"helpful": Range(max=1.5), "harmless": Range()}, {"helpful": -0.2}, PARTS)


def test_a_split_preference_is_one_preference_or_a_profile():
    whole = (("harmless", 1.0), ("helpful.attention", 0.7), ("helpful.mlp", 0.7), ("helpful.other", 0.7))
    assert SPLIT.coefficients({"helpful": 0.7, "harmless": 1}) == whole
    profile = {"helpful.attention": 0.35, "helpful.mlp": 1.4}
    assert dict(SPLIT.coefficients(profile)) == {"harmless": 0.0, "helpful.other": 0.0, **profile}


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"helpful.mlp": 1.6}, "preference_out_of_range", r"outside the allowed range \[-1, 1.5\]"),
        ({"helpful": 1.6}, "preference_out_of_range", r"outside the allowed range \[-1, 1.5\]"),
        ({"helpful.mlp": -0.3}, "preference_below_floor", "below the operator's floor of -0.2"),
        ({"helpful": -0.3}, "preference_below_floor", "below the operator's floor of -0.2"),
        ({"helpful": 1.0, "helpful.mlp": 0.5}, "preference_and_part", "beside its part 'helpful.mlp'"),
        ({"helpful.depth1of2": 1.0}, "unknown_preference", "served here: harmless, helpful, helpful.attention"),
    ],
)
def test_the_bounds_of_a_split_preference_hold_on_every_part(asked, code, says):
    with pytest.raises(PreferenceError, match=says) as caught:
        SPLIT.coefficients(asked)
    assert caught.value.code == code


def test_keys_bound_the_parts_by_the_preference():
    key = Key(
        id="k",
        name="them",
        sha256="0" * 64,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        ranges={"helpful": Range(min=0, max=0.5)},
    )
    policy = policy_for(key, SPLIT)
    assert dict(policy.coefficients({"helpful": 0.5}))["helpful.mlp"] == 0.5
    with pytest.raises(PreferenceError, match=r"'helpful\.mlp': 0\.6 is outside"):
        policy.coefficients({"helpful.mlp": 0.6})


def part(label, labels, whole="blake3:1", preference="helpful"):
    return Vector(f"blake3:{label}", preference, {"whole": whole}, {"part": label, "parts": labels})


HALVES = ["depth1of2", "depth2of2"]
WHOLE = Vector("blake3:1", "helpful", {}, {})


def test_parts_are_found_by_name_and_lineage():
    halves = {f"helpful.{label}": part(label, HALVES) for label in reversed(HALVES)}
    assert parts_of(halves | {"harmless": WHOLE}) == {"helpful": ("helpful.depth1of2", "helpful.depth2of2")}
    assert parts_of({"helpful": WHOLE}) == {}
    policy = policy_of(
        config(vectors={}, floors={"helpful": 0.1}, ranges={"helpful": {"min": 0.1, "default": 0.1}}),
        list(halves),
        parts_of(halves),
    )
    assert policy.coefficients({}) == (("helpful.depth1of2", 0.1), ("helpful.depth2of2", 0.1))


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        ({"helpful.depth1of2": part("depth1of2", HALVES)}, "helpful.depth2of2 is missing"),
        ({"a": part("depth1of2", HALVES)}, "'a' is a part of a vector; end its name in '.depth1of2'"),
        ({"helpful.mlp": WHOLE}, "'helpful.mlp' is named as a part, and is none"),
        ({"helpful": WHOLE, **{f"helpful.{h}": part(h, HALVES) for h in HALVES}}, "it is served whole, too"),
        ({f"helpful.{h}": part(h, HALVES, whole=f"blake3:{h}") for h in HALVES}, "not the parts of one vector"),
        ({f"helpful.{h}": part(h, None) for h in HALVES}, "not the parts of one vector"),
    ],
)
def test_parts_that_are_no_whole_are_refused(vectors, says):
    with pytest.raises(InputError, match=says):
        parts_of(vectors)


def test_a_part_is_no_way_around_a_floor():
    halves = {f"helpful.{label}": part(label, HALVES) for label in HALVES}
    no_way_around({"helpful": 0.0}, halves, parts_of(halves))
    with pytest.raises(InputError, match="'helpful' and 'kind' are vectors of one preference"):
        no_way_around({"helpful": 0.0}, halves | {"kind": WHOLE}, parts_of(halves))
    with pytest.raises(InputError, match=r"'kind' and 'helpful\.depth1of2' are vectors of one preference"):
        no_way_around({"kind": 0.0}, halves | {"kind": WHOLE}, parts_of(halves))


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

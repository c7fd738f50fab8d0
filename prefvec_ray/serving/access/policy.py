"""Which coefficients a caller may ask for. What is outside is refused by name, never clamped.

Two bounds: the *range* of each preference, which a key may have of its own, and the operator's *floors*, absolute
minima for everybody but the keys that explicitly may go below. A floor bounds a coefficient, not the model's behaviour:
that no other served vector does the same harm is for the operator to see to. Vectors that are known to be the same
preference are refused beside a floor (`no_way_around`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import check_preference, skeleton
from prefvec_ray.serving.access.keys import Key
from prefvec_ray.serving.config import Range, ServingConfig
from prefvec_ray.serving.engines.base import Coefficients

LONGEST_NAME = 64


class PreferenceError(InputError):
    """A coefficient that is not served. `preference` is its name, `code` says in one word what is wrong."""

    def __init__(self, message: str, preference: str, code: str):
        super().__init__(message, preference, code)
        self.preference, self.code = preference, code

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Policy:
    """What one caller may ask for: the range of every preference that is served, and floors that hold whatever the
    ranges say."""

    ranges: Mapping[str, Range]
    floors: Mapping[str, float] = field(default_factory=dict)

    def coefficients(self, asked: Mapping[str, float]) -> Coefficients:
        """One coefficient for every preference, sorted by name; those not asked for get the range's default.

        Raises PreferenceError for an unknown preference, NaN or infinity, and whatever lies outside its range or below
        its floor.
        """
        for name, eta in asked.items():
            if name not in self.ranges:
                known = ", ".join(sorted(self.ranges)) or "none"
                short = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
                raise PreferenceError(
                    f"unknown preference {short!a}; served here: {known}", short, "unknown_preference"
                )
            if not math.isfinite(eta):
                raise PreferenceError(
                    f"preference {name!r}: {eta} is not a finite number; give one", name, "invalid_preference"
                )
            allowed = self.ranges[name]
            if not allowed.min <= eta <= allowed.max:
                raise PreferenceError(
                    f"preference {name!r}: {eta:g} is outside the allowed range [{allowed.min:g}, {allowed.max:g}];"
                    " choose a value inside it",
                    name,
                    "preference_out_of_range",
                )
        # + 0.0: -0.0 becomes 0.0, which is the same weights.
        chosen = tuple((name, asked.get(name, self.ranges[name].default) + 0.0) for name in sorted(self.ranges))
        for name, eta in chosen:
            if eta < self.floors.get(name, -math.inf):
                raise PreferenceError(
                    f"preference {name!r}: {eta:g} is below the operator's floor of {self.floors[name]:g}; choose more",
                    name,
                    "preference_below_floor",
                )
        return chosen


def policy_of(config: ServingConfig, preferences: list[str]) -> Policy:
    """The anonymous caller's policy.

    Raises InputError where the config bounds a preference that is not served (a floor under a misspelt name would
    protect nobody), and where a range reaches below a floor.
    """
    for setting, names in (("ranges", config.ranges), ("floors", config.floors)):
        unknown = sorted(set(names) - set(preferences))
        if unknown:
            raise InputError(
                f"{setting}: {', '.join(map(repr, unknown))} not among the served preferences"
                f" ({', '.join(sorted(preferences)) or 'none'}); correct the name or serve its vector"
            )
    ranges = {name: config.ranges.get(name, config.default_range) for name in preferences}
    _above_floors(ranges, config.floors, "ranges")
    return Policy(ranges, dict(config.floors))


def policy_for(key: Key, everybody: Policy) -> Policy:
    """The policy of a key's holder: the key's ranges, and everybody's for the other preferences.

    Raises InputError where the key bounds a preference that is not served, or has a range that reaches below a floor
    without being one that may go below.
    """
    unknown = sorted(set(key.ranges) - set(everybody.ranges))
    if unknown:
        raise InputError(
            f"{key.id} ({key.name}): ranges for {', '.join(map(repr, unknown))}, not among the served preferences"
            f" ({', '.join(sorted(everybody.ranges))}); correct the name or serve its vector"
        )
    ranges = {**everybody.ranges, **key.ranges}
    if key.may_go_below_floor:
        return Policy(ranges)
    _above_floors(ranges, everybody.floors, f"{key.id} ({key.name})")
    return replace(everybody, ranges=ranges)


def _above_floors(ranges: Mapping[str, Range], floors: Mapping[str, float], where: str) -> None:
    for name, floor in floors.items():
        if ranges[name].min < floor:
            raise InputError(
                f"{where}: {name!r} may go down to {ranges[name].min:g}, below its floor of {floor:g}; write a range"
                f" with min: {floor:g} or more, or lower the floor"
            )


class Named(Protocol):
    """What `no_way_around` looks at: a version of a vector in the registry."""

    @property
    def digest(self) -> str: ...
    @property
    def preference(self) -> str: ...


def no_way_around(floors: Mapping[str, float], vectors: Mapping[str, Named]) -> None:
    """Raises InputError where a preference with a floor is served under a second name too, be it as the same bytes,
    another version or form, the delta of one of its runs, or under a look-alike of its name: coefficients add up, and
    the floor would bound half."""
    for name in floors:
        for other, vector in vectors.items():
            check_preference(vector.preference)
            same = vector.digest == vectors[name].digest
            if other != name and (same or _subject(vector) == _subject(vectors[name])):
                raise InputError(
                    f"floors: {name!r} and {other!r} are vectors of one preference, so that {other!r} would be a way"
                    f" around the floor under {name!r}; serve one of them"
                )


def _subject(vector: Named) -> str:
    return skeleton(vector.preference)

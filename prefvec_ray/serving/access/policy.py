"""Which coefficients a caller may ask for. What is outside is refused by name, never clamped.

Two bounds: the *range* of each preference, which a key may have of its own, and the operator's *floors*, absolute
minima for everybody but the keys that explicitly may go below. A floor bounds a coefficient, not the model's behaviour:
that no other served vector does the same harm is for the operator to see to. Vectors that are known to be the same
preference are refused beside a floor (`no_way_around`).
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import WHOLE, check_preference, part_name, skeleton
from prefvec_ray.serving.access.keys import Key
from prefvec_ray.serving.config import Range, ServingConfig
from prefvec_ray.serving.engines.base import Coefficients

LONGEST_NAME = 64
Parts = Mapping[str, tuple[str, ...]]
"""preference that is served in parts -> their names"""
NO_PARTS: Parts = {}


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
    ranges say. Both hold for each part of a split preference."""

    ranges: Mapping[str, Range]
    floors: Mapping[str, float] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)

    def preference_of(self, vector: str) -> str:
        """The preference that a served vector is, or is a part of."""
        return next((name for name, parts in self.parts.items() if vector in parts), vector)

    def coefficients(self, asked: Mapping[str, float]) -> Coefficients:
        """One coefficient for every vector, sorted by name; those not asked for get the range's default.

        A split preference's own name stands for all of its parts; the parts' names give it a profile.

        Raises PreferenceError for an unknown preference, one that is named beside its parts, NaN or infinity, and
        whatever lies outside its range or below its floor.
        """
        asked = self._of_vectors(asked)
        for name, eta in asked.items():
            preference = self.preference_of(name)
            if preference not in self.ranges:
                known = ", ".join(sorted([*self.ranges, *itertools.chain(*self.parts.values())])) or "none"
                short = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
                raise PreferenceError(
                    f"unknown preference {short!a}; served here: {known}", short, "unknown_preference"
                )
            if not math.isfinite(eta):
                raise PreferenceError(
                    f"preference {name!r}: {eta} is not a finite number; give one", name, "invalid_preference"
                )
            allowed = self.ranges[preference]
            if not allowed.min <= eta <= allowed.max:
                raise PreferenceError(
                    f"preference {name!r}: {eta:g} is outside the allowed range [{allowed.min:g}, {allowed.max:g}];"
                    " choose a value inside it",
                    name,
                    "preference_out_of_range",
                )
        # + 0.0: -0.0 becomes 0.0, which is the same weights.
        defaults = {v: r.default for name, r in self.ranges.items() for v in self.parts.get(name, (name,))}
        chosen = tuple((name, asked.get(name, default) + 0.0) for name, default in sorted(defaults.items()))
        for name, eta in chosen:
            floor = self.floors.get(self.preference_of(name), -math.inf)
            if eta < floor:
                raise PreferenceError(
                    f"preference {name!r}: {eta:g} is below the operator's floor of {floor:g}; choose more",
                    name,
                    "preference_below_floor",
                )
        return chosen

    def _of_vectors(self, asked: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, eta in asked.items():
            parts = self.parts.get(name, (name,))
            twice = next((part for part in parts if part != name and part in asked), None)
            if twice is not None:
                raise PreferenceError(
                    f"preference {name!r} is asked for beside its part {twice!r}; give one coefficient for the whole,"
                    " or one for each part",
                    name,
                    "preference_and_part",
                )
            found |= dict.fromkeys(parts, eta)
        return found


def policy_of(config: ServingConfig, vectors: list[str], parts: Parts = NO_PARTS) -> Policy:
    """The anonymous caller's policy, with `parts` of the split preferences among the served `vectors`.

    Raises InputError where the config bounds a preference that is not served (a floor under a misspelt name would
    protect nobody), and where a range reaches below a floor.
    """
    split = set(itertools.chain(*parts.values()))
    preferences = sorted([name for name in vectors if name not in split] + list(parts))
    for setting, names in (("ranges", config.ranges), ("floors", config.floors)):
        unknown = sorted(set(names) - set(preferences))
        if unknown:
            raise InputError(
                f"{setting}: {', '.join(map(repr, unknown))} not among the served preferences"
                f" ({', '.join(preferences) or 'none'}); correct the name or serve its vector"
            )
    ranges = {name: config.ranges.get(name, config.default_range) for name in preferences}
    _above_floors(ranges, config.floors, "ranges")
    return Policy(ranges, dict(config.floors), parts)


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
        return Policy(ranges, parts=everybody.parts)
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
    """What is looked at here of a version of a vector in the registry."""

    @property
    def digest(self) -> str: ...
    @property
    def preference(self) -> str: ...
    @property
    def parents(self) -> Mapping[str, str]: ...
    @property
    def recipe(self) -> Mapping[str, Any]: ...


def parts_of(vectors: Mapping[str, Named]) -> Parts:
    """The preferences that are served in parts: `helpful` where `helpful.depth1of2` and `helpful.depth2of2` are.

    Raises InputError for a part under a name that does not say so, a name of a part for what is none, and a preference
    of which a part is missing, of which the parts are of two vectors, or that is also served whole.
    """
    found: dict[str, dict[str, str]] = {}
    for name, vector in vectors.items():
        named = part_name(name)
        if WHOLE in vector.parents:
            label = str(vector.recipe.get("part"))
            if named is None or named[1] != label:
                raise InputError(f"vectors: {name!r} is a part of a vector; end its name in '.{label}'")
            found.setdefault(named[0], {})[label] = name
        elif named is not None:
            raise InputError(f"vectors: {name!r} is named as a part, and is none; choose another name for it")
    split = {}
    for preference, parts in found.items():
        stated = [vectors[name].recipe.get("parts") for name in parts.values()]
        labels = [str(label) for label in stated[0]] if isinstance(stated[0], list) else []
        missing = [f"{preference}.{label}" for label in labels if label not in parts]
        one = len({vectors[name].parents[WHOLE] for name in parts.values()}) == 1 and set(parts) <= set(labels)
        wrong = "" if one else "they are not the parts of one vector"
        wrong = f"{', '.join(missing)} is missing" if missing else wrong
        wrong = "it is served whole, too" if preference in vectors else wrong
        if wrong:
            raise InputError(f"vectors: {preference!r} is served in parts, but {wrong}; name each part of one split")
        split[preference] = tuple(parts[label] for label in labels)
    return split


def no_way_around(floors: Mapping[str, float], vectors: Mapping[str, Named], parts: Parts = NO_PARTS) -> None:
    """Raises InputError where a preference with a floor is served under a second name too, be it as the same bytes,
    another version or form, the delta of one of its runs, or under a look-alike of its name: coefficients add up, and
    the floor would bound half."""
    for name in floors:
        own = parts.get(name, (name,))
        for other, vector in vectors.items():
            check_preference(vector.preference)
            same = {vector.digest, _subject(vector)} & {
                s for n in own for s in (vectors[n].digest, _subject(vectors[n]))
            }
            if other not in own and same:
                raise InputError(
                    f"floors: {name!r} and {other!r} are vectors of one preference, so that {other!r} would be a way"
                    f" around the floor under {name!r}; serve one of them"
                )


def _subject(vector: Named) -> str:
    return skeleton(vector.preference)

"""Which coefficients a caller may ask for. What is outside is refused by name, never clamped."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prefvec_ray.errors import InputError
from prefvec_ray.serving.config import Range, ServingConfig
from prefvec_ray.serving.engine import Coefficients


class PreferenceError(InputError):
    """A coefficient that is not served. `preference` is its name, `code` says in one word what is wrong."""

    def __init__(self, message: str, preference: str, code: str):
        super().__init__(message, preference, code)
        self.preference, self.code = preference, code

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Policy:
    """Allowed range of every preference that is served."""

    ranges: Mapping[str, Range]

    def coefficients(self, asked: Mapping[str, float]) -> Coefficients:
        """One coefficient for every preference, sorted by name; those not asked for get the range's default.

        Raises PreferenceError for an unknown preference, NaN or infinity, and whatever lies outside its range.
        """
        for name, eta in asked.items():
            if name not in self.ranges:
                known = ", ".join(sorted(self.ranges)) or "none"
                raise PreferenceError(f"unknown preference {name!r}; served here: {known}", name, "unknown_preference")
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
        return tuple((name, float(asked.get(name, self.ranges[name].default))) for name in sorted(self.ranges))


def policy_of(config: ServingConfig, preferences: list[str]) -> Policy:
    """The anonymous caller's policy. Raises InputError where the config bounds a preference that is not served: a floor
    under a misspelt name would protect nobody."""
    unknown = sorted(set(config.ranges) - set(preferences))
    if unknown:
        raise InputError(
            f"ranges: {', '.join(map(repr, unknown))} not among the served preferences"
            f" ({', '.join(sorted(preferences)) or 'none'}); correct the name or serve its vector"
        )
    return Policy({name: config.ranges.get(name, config.default_range) for name in preferences})

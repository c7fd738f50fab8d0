"""The settings that a table or a grid measures, each a linear combination of the vectors of one `LiveModel`.

The live model of one DPO seed holds, for every preference p, the vector `p` (phi_p = theta_p+ - theta_p-)
and the run's own delta `p+` (theta_p+ - theta_base), and `mixed` where such a run was made. Every baseline
is then a setting of coefficients, and one model measures all of them.
"""

import itertools
from collections.abc import Mapping, Sequence

from prefvec_ray.artifacts.evaluation import Setting
from prefvec_ray.common.errors import InputError

MIXED = "mixed"
MAX_PREFERENCES = 6


def is_base(coefficients: Mapping[str, float]) -> bool:
    """Whether a setting is the base model as it is: no coefficient but 0."""
    return not any(coefficients.values())


def baselines(preferences: Sequence[str], *, mixed: bool = True) -> list[Setting]:
    """What preference vectors are compared with, for 1 to 6 preferences.

    - the base; each preference's own DPO run (DPO, arXiv 2305.18290);
    - DPO on all the preferences' pairs at once, if `mixed`, and twice its step: phi_p is close to twice
      one run's displacement, so a comparison without this control would credit the vectors with mere length;
    - the reward soup, the plain mean of the positive runs (Rewarded soups, arXiv 2306.04488);
    - twice the sum of the positive runs: the step of phi at 1 without any negative run.
    """
    names = _checked(preferences)
    table = [Setting(name="base", kind="base", coefficients={})]
    table += [Setting(name=f"DPO {p}+", kind="single", coefficients={f"{p}+": 1.0}) for p in names]
    if mixed:
        table += [
            Setting(name="DPO mixed", kind="mixed", coefficients={MIXED: 1.0}),
            Setting(name="mixed × 2", kind="control", coefficients={MIXED: 2.0}),
        ]
    if len(names) > 1:
        share = 1 / len(names)
        table.append(Setting(name="reward soup", kind="soup", coefficients={f"{p}+": share for p in names}))
    table.append(Setting(name="positives × 2", kind="control", coefficients={f"{p}+": 2.0 for p in names}))
    return table


def vector_settings(preferences: Sequence[str]) -> list[Setting]:
    """The vectors all at 0.5, all at 1, and each in turn at 1 with the others at 0.5."""
    names = _checked(preferences)
    points = [(0.5,) * len(names), (1.0,) * len(names)]
    if len(names) > 1:
        points += [tuple(1.0 if q == p else 0.5 for q in names) for p in names]
    return [vectors_at(dict(zip(names, point, strict=True))) for point in points]


def vectors_at(coefficients: dict[str, float]) -> Setting:
    """The vectors at these coefficients, named by them: `vectors (1, 0.5)`."""
    values = ", ".join(f"{value:g}" for value in coefficients.values())
    return Setting(name=f"vectors ({values})", kind="vectors", coefficients=coefficients)


def together_name(preferences: int) -> str:
    """The name of the setting with every vector at 1."""
    return f"vectors ({', '.join(['1'] * preferences)})"


def grid(preferences: Sequence[str], *, steps: int = 5, low: float = -1.0, high: float = 1.0) -> list[dict[str, float]]:
    """Coefficients on a regular grid, `steps` values from `low` to `high` an axis.

    One or two preferences: the full grid. More: every plane of two axes with the other coefficients at 0,
    since a full grid of six axes would have steps^6 points.

    Raises:
        InputError: fewer than 2 steps, an empty range, or a range without 0 where planes need it.
    """
    names = _checked(preferences)
    if steps < 2 or not low < high:
        raise InputError(f"a grid of {steps} steps from {low} to {high}; give at least 2 steps and low < high")
    values = [low + (high - low) * i / (steps - 1) for i in range(steps)]
    if len(names) <= 2:
        return [dict(zip(names, point, strict=True)) for point in itertools.product(values, repeat=len(names))]
    if not low <= 0 <= high:
        raise InputError(f"a grid over {len(names)} preferences is made of planes through 0; give low <= 0 <= high")
    points = {
        tuple({p: x, q: y}.get(name, 0.0) for name in names)
        for p, q in itertools.combinations(names, 2)
        for x, y in itertools.product(values, repeat=2)
    }
    return [dict(zip(names, point, strict=True)) for point in sorted(points)]


def _checked(preferences: Sequence[str]) -> list[str]:
    names = list(preferences)
    if not 1 <= len(names) <= MAX_PREFERENCES:
        raise InputError(f"{len(names)} preferences given; expected 1 to {MAX_PREFERENCES}")
    if len(set(names)) != len(names):
        raise InputError(f"preferences {names} contain one name twice")
    return names

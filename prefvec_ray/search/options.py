"""The options of a search. Each is declared here alone: the YAML file and `search` share them."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.search.result import Goal

FULL_RANGE = (-1.0, 1.0)
"""Of a coefficient, where `ranges` names no other."""

Sampler = Literal["auto", "gp", "tpe", "nsga2", "random", "grid"]

BaseLimit = Annotated[str, Field(pattern=r"^\s*base\s*([+-]\s*(\d+\.?\d*|\.\d+)\s*)?$")]
"""`base`, `base - 0.02`: a limit beside the base's mean."""

Bounds = dict[str, tuple[float, float]]
"""Vector -> the lowest and the highest coefficient. 0, the base, lies between them."""


class Processes(Config):
    """The processes of the cluster that measure."""

    actors: int = Field(default=2, ge=1)
    """Processes that measure at once, each with `cpus` and `gpus`."""
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)

    @property
    def resources(self) -> dict[str, float]:
        """Of one process, as Ray names them."""
        return {"cpu": self.cpus, "gpu": self.gpus} if self.gpus else {"cpu": self.cpus}


class SearchConfig(Processes):
    """What is searched for, what may be tried, and how long."""

    objectives: list[str] = Field(min_length=1)
    """Metrics of the scorer."""
    limits: dict[str, FiniteFloat | BaseLimit] = {}
    """A floor for a metric that is maximized, a ceiling for one that is minimized: a number, or one beside the base's
    mean, such as `base - 0.02`."""
    ranges: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    """Vector -> [low, high]; default [-1, 1]."""
    start: list[dict[str, FiniteFloat]] = []
    """Settings to try right after the base; vectors left out are 0."""
    trials: int = Field(default=40, ge=2)
    """Settings to try at most, dropped and failed ones included."""
    answers: int | None = Field(default=None, ge=1)
    """Budget of generated answers; a setting begins only if the budget lets it be measured to the end."""
    seconds: float | None = Field(default=None, gt=0)
    """No setting begins later than this after the start."""
    patience: int | None = Field(default=16, ge=2)
    """Stop when the last so many settings raised the hypervolume by less than its standard error; null: never."""
    sampler: Sampler = "auto"
    """`auto` is `gp` up to four objectives and `tpe` beyond, where a Gaussian process takes many seconds a proposal."""
    grid_steps: int = Field(default=5, ge=2)
    """Values an axis of the `grid` sampler."""
    rungs: tuple[float, ...] = (0.25, 1.0)
    """Shares of the answers after which a setting may be dropped; [1] measures every setting in full."""
    caution: float = Field(default=1.0, ge=0)
    """Drop a setting when another is better in every objective by so many paired standard errors."""
    timeout: float = Field(default=3600.0, gt=0)
    """Seconds that a rung of one setting may take before its process is killed and the setting counts as failed."""
    control_steps: int = Field(default=5, ge=0)
    """Settings along each coefficient, the others 0, measured on the report prompts; 0 for none."""
    seed: int = 0

    def goal(self, metrics: Mapping[str, Metric]) -> Goal:
        """InputError where an objective or a limit is none of `metrics`, or has no direction."""
        goal = Goal(
            objectives=tuple(self.objectives),
            metrics=dict(metrics),
            limits={name: limit for name, limit in self.limits.items() if not isinstance(limit, str)},
            beside_base={name: _beside(limit) for name, limit in self.limits.items() if isinstance(limit, str)},
        )
        goal.check()
        return goal

    def bounds(self, vectors: Iterable[str]) -> Bounds:
        """The range of each coefficient; InputError where one does not contain the base, or more than that."""
        names = list(vectors)
        if not names:
            raise InputError("no vectors to search over; give at least one")
        for name in self.ranges:
            if name not in names:
                raise InputError(f"a range is given for {name!r}, but the vectors are {', '.join(names)}")
        found = {name: self.ranges.get(name, FULL_RANGE) for name in names}
        for name, (low, high) in found.items():
            if not -math.inf < low <= 0 <= high < math.inf or low == high:
                raise InputError(
                    f"the range of {name!r} is [{low:g}, {high:g}]; it must contain 0, the base, and more than that"
                )
        return found

    def first(self, bounds: Bounds) -> list[dict[str, float]]:
        """The base and the settings of `start`, in full; InputError where one is not within `bounds`."""
        found = [dict.fromkeys(bounds, 0.0)]
        for point in self.start:
            full = {name: point.get(name, 0.0) for name in bounds}
            if set(point) - set(bounds) or any(not low <= full[n] <= high for n, (low, high) in bounds.items()):
                raise InputError(f"start setting {point} is not within the ranges {bounds}")
            found.append(full)
        return found

    def check(self, vectors: Iterable[str], answers: int) -> None:
        """InputError where the budget does not cover what every search of these `vectors` begins with.

        Args:
            answers: generated for one setting that is measured to the end.
        """
        bounds = self.bounds(vectors)
        points = len(self.first(bounds)) + (self.grid_steps ** len(bounds) if self.sampler == "grid" else 0)
        if self.trials < points:
            raise InputError(f"{self.trials} trials; this search begins with {points} settings, give at least as many")
        if self.answers is not None and self.answers < answers:
            raise InputError(f"a budget of {self.answers} answers; one setting alone takes {answers}")


def _beside(limit: str) -> float:
    """What a `BaseLimit` adds to the base's mean."""
    return float(limit.replace("base", "").replace(" ", "") or 0)

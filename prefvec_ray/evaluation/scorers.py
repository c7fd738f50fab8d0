"""What an answer is worth: the scorer protocol, the tiny world's exact scorer, and a user's own.

A scorer says in which direction each of its metrics is better and in which range it lies, so that no sign
is ever flipped on the way to a report and no wrong number enters an average.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict

from prefvec_ray.errors import InputError
from prefvec_ray.preferences import METRICS, TinyWorld

Direction = Literal["maximize", "minimize"]
Scores = dict[str, list[float | None]]
"""Metric -> one value per answer; None where the metric is not defined for that prompt or answer."""


class Metric(BaseModel):
    """How to read a score. `direction` None: neither way is better in itself. `low`, `high` None: unbounded
    there."""

    model_config = ConfigDict(frozen=True)

    direction: Direction | None
    low: float | None = None
    high: float | None = None
    meaning: str = ""

    @property
    def worst(self) -> float | None:
        """The worst value that the range allows, where there is one."""
        return {"maximize": self.low, "minimize": self.high}[self.direction] if self.direction else None

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`: positive is better, whatever the direction."""
        if self.direction is None:
            raise InputError("a metric without a direction has no gain; choose one that is maximized or minimized")
        return value - over if self.direction == "maximize" else over - value


@runtime_checkable
class Scorer(Protocol):
    """Scores answers. Called with prompts and answers of equal length, a prompt repeated for each of its
    draws."""

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores: ...


class TinyWorldScorer:
    """The embedded world's exact scores. Holds no more than the world's preset and seed, so it travels
    well."""

    metrics: Mapping[str, Metric] = {
        name: Metric(
            direction={"higher": "maximize", "lower": "minimize", None: None}[metric.better],
            low=metric.low,
            high=metric.high,
            meaning=metric.meaning,
        )
        for name, metric in METRICS.items()
    }

    def __init__(self, world: TinyWorld) -> None:
        self.world = world

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        return self.world.scores(prompts, responses)

    def __reduce__(self) -> tuple[Any, ...]:
        return _tiny_world_scorer, (self.world.preset, self.world.seed)


def _tiny_world_scorer(preset: str, seed: int) -> TinyWorldScorer:
    return TinyWorldScorer(TinyWorld(preset, seed))


F = TypeVar("F", bound=Callable[..., Any])


def scorer(**metrics: Metric) -> Callable[[F], F]:
    """Make a function a scorer by stating its metrics.

    @scorer(brevity=Metric(direction="minimize", low=0))
    def brevity(prompts, responses):
        return {"brevity": [len(text.split()) for text in responses]}
    """

    def mark(function: F) -> F:
        function.metrics = metrics  # type: ignore[attr-defined]
        return function

    return mark


def load_scorer(where: str) -> Scorer:
    """The scorer at `module:name`: a function marked with `@scorer`, or any object with `metrics` that can
    be called.

    Importing runs the module's code: load only what you trust.

    Raises:
        InputError: the module or the name is not there, or it states no metrics.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InputError(f"scorer {where!r}: expected module:function, such as my_package.scores:brevity")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"scorer {where!r}: cannot import {module_name}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"scorer {where!r}: {module_name} has no {name!r}")
    if isinstance(found, type) or not isinstance(found, Scorer) or not callable(found):
        raise InputError(
            f"scorer {where!r}: states no metrics; mark the function with @scorer(name=Metric(direction=...))"
        )
    return found


def run_scorer(scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
    """Score the answers and check every value.

    Raises:
        ValueError: the scorer left out a metric or added one, gave another number of values than there are
            answers, or gave NaN, a value that is no number, or one outside the metric's range.
    """
    scores = scorer(prompts, responses)
    if set(scores) != set(scorer.metrics):
        raise ValueError(f"the scorer states metrics {sorted(scorer.metrics)} but returned {sorted(scores)}")
    for name, values in scores.items():
        metric = scorer.metrics[name]
        if len(values) != len(responses):
            raise ValueError(f"metric {name!r}: {len(values)} values for {len(responses)} answers")
        for index, value in enumerate(values):
            if value is None:
                continue
            problem = _problem(value, metric)
            if problem:
                raise ValueError(
                    f"metric {name!r} gave {value!r} for answer {index} ({responses[index][:60]!r}): {problem}"
                )
    return scores


def _problem(value: Any, metric: Metric) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "expected a float, or None where the metric is not defined"
    if not math.isfinite(value):
        return "not a finite number; return None where the metric is not defined"
    if metric.low is not None and value < metric.low:
        return f"below its stated range, which begins at {metric.low}"
    if metric.high is not None and value > metric.high:
        return f"above its stated range, which ends at {metric.high}"
    return ""

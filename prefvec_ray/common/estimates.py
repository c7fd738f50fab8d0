"""Means with their standard errors."""

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """A mean and its standard error over `n` prompts; `stderr` is None where one prompt alone was scored."""

    model_config = ConfigDict(frozen=True)

    mean: float
    stderr: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.stderr is None else f" ± {self.stderr:.3f}")


def estimate(per_prompt: Sequence[float | None]) -> Estimate | None:
    """Mean and standard error over the prompts where the metric is defined; None where it is defined on none.

    Samples of one prompt are not independent of each other, prompts are: so the error is taken over prompts.
    """
    values = [value for value in per_prompt if value is not None]
    if not values:
        return None
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(mean=statistics.fmean(values), stderr=stderr, n=len(values))

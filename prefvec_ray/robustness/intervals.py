"""The intervals behind every verdict. All are of 95%."""

import math
from collections.abc import Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest, norm, sem, t
from torch import Tensor

CONFIDENCE = 0.95


class _Interval(BaseModel):
    """A mean over `n` inputs or runs, and the ends of its interval."""

    model_config = ConfigDict(frozen=True)

    name: str
    mean: float
    low: float
    high: float
    n: int


class Rate(_Interval):
    """A share of `n` inputs, with Wilson's score interval."""

    @classmethod
    def of(cls, name: str, hits: Tensor) -> "Rate":
        return cls.counted(name, int(hits.sum()), len(hits))

    @classmethod
    def counted(cls, name: str, k: int, n: int) -> "Rate":
        ends = binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
        return cls(name=name, mean=k / n, low=float(ends.low), high=float(ends.high), n=n)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Gap(_Interval):
    """A difference, with its interval."""

    @classmethod
    def paired(cls, name: str, first: Tensor, second: Tensor) -> "Gap":
        """Share of `first` minus share of `second` over the same inputs: the adjusted Wald interval for paired
        proportions (Bonett and Price, 2012), which has a width also where the two agree on every input."""
        n = len(first)
        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        a, b = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
        low, high = norm.interval(CONFIDENCE, loc=a - b, scale=math.sqrt((a + b - (a - b) ** 2) / (n + 2)))
        mean = (only_first - only_second) / n
        return cls(name=name, mean=mean, low=max(-1.0, float(low)), high=min(1.0, float(high)), n=n)

    @classmethod
    def over_runs(cls, name: str, values: Sequence[float]) -> "Gap":
        """Mean over training runs with Student's t interval; one run has no interval (-inf to inf)."""
        n, mean = len(values), fmean(values)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * sem(values)) if n > 1 else math.inf
        return cls(name=name, mean=mean, low=mean - half, high=mean + half, n=n)

    def __str__(self) -> str:
        points = f"{100 * self.mean:+.1f}"
        return f"{points} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]" if math.isfinite(self.low) else points

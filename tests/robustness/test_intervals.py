"""The intervals of SciPy, against the formulas of the papers."""

import math

import pytest
import torch

from prefvec_ray.robustness.intervals import Gap, Rate

Z = 1.959963984540054
"""The normal distribution's quantile at 0.975."""


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (1, 300), (250, 300)])
def test_a_rate_has_wilsons_score_interval(k, n):
    rate = Rate.counted("x", k, n)
    p = k / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert (rate.mean, rate.n) == (p, n)
    assert rate.low == pytest.approx(max(0.0, centre - half), abs=1e-12)
    assert rate.high == pytest.approx(min(1.0, centre + half), abs=1e-12)
    assert 0 <= rate.low <= p <= rate.high <= 1


def test_a_paired_gap_has_the_adjusted_wald_interval():
    first = torch.tensor([True] * 9 + [False] * 11)
    second = torch.tensor([True] * 5 + [False] * 13 + [True] * 2)
    a, b, n = (4 + 1) / 22, (2 + 1) / 22, 20
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    gap = Gap.paired("x", first, second)
    assert gap.mean == pytest.approx(2 / 20)
    assert (gap.low, gap.high) == pytest.approx((a - b - half, a - b + half), abs=1e-12)
    same = Gap.paired("x", first, first)
    assert same.low < 0 < same.high, "agreement on every input is not certainty"


def test_a_gap_over_runs_has_students_interval():
    gap = Gap.over_runs("x", [0.1, 0.3, 0.2])
    quantile = 0.95 * math.sqrt(2 / 0.0975)  # of two degrees of freedom, at 0.975, in closed form
    half = quantile * 0.1 / math.sqrt(3)
    assert (gap.low, gap.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-12)
    equal = Gap.over_runs("x", [0.25, 0.25])
    assert (equal.low, equal.mean, equal.high) == (0.25, 0.25, 0.25)
    one = Gap.over_runs("x", [0.5])
    assert (one.low, one.high) == (-math.inf, math.inf)

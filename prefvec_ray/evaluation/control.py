"""What was claimed, checked against what was measured. A claim that fails is reported as failing; none is
dropped."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from prefvec_ray.artifacts.evaluation import Claim, Effect, Evaluation, Metric, ReportData
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation.evaluate import better, compare_metric
from prefvec_ray.evaluation.settings import together_name

TOLERANCE = 0.02
"""How far a metric may fall from one coefficient to the next and still be called monotone; sampling noise
is about this."""

ERRORS = 2.0
"""How many paired standard errors an improvement must exceed to be called one."""


def lines(grid: Sequence[Evaluation], preference: str) -> list[list[Evaluation]]:
    """The lines of a grid along one coefficient: the others equal, sorted by this one, at least two points
    each."""
    groups: dict[tuple[tuple[str, float], ...], list[Evaluation]] = defaultdict(list)
    for evaluation in grid:
        others = tuple(sorted((p, eta) for p, eta in evaluation.coefficients.items() if p != preference))
        groups[others].append(evaluation)
    found = [
        sorted(group, key=lambda e: e.coefficients.get(preference, 0.0)) for group in groups.values() if len(group) > 1
    ]
    if not found:
        raise InputError(f"the grid has no line along {preference!r}: no two points differ in it alone")
    return found


def mean_path(grid: Sequence[Evaluation], preference: str, metric: str) -> list[tuple[float, float]]:
    """(coefficient of `preference`, mean of `metric` over the other coefficients), over the lines of full
    length."""
    along = lines(grid, preference)
    longest = max(map(len, along))
    full = [line for line in along if len(line) == longest]
    return [
        (full[0][i].coefficients.get(preference, 0.0), statistics.fmean(line[i].mean(metric) for line in full))
        for i in range(longest)
    ]


def monotone(
    grid: Sequence[Evaluation],
    preference: str,
    metric: str,
    metrics: Mapping[str, Metric],
    *,
    tolerance: float = TOLERANCE,
) -> list[Claim]:
    """Two claims: `metric` never gets worse by more than `tolerance` from one coefficient of `preference`
    to the next higher, (1) on the mean over the other coefficients, (2) on every line of the grid."""
    along = lines(grid, preference)
    etas, means = zip(*mean_path(grid, preference, metric), strict=True)
    gains = [metrics[metric].gain(b, a) for a, b in itertools.pairwise(means)]
    claim = f"{metric} is monotone in the coefficient of {preference} from {etas[0]:g} to {etas[-1]:g}"
    path = " → ".join(f"{mean:.3f}" for mean in means)
    claims = [
        Claim(
            text=f"{claim}, on the mean over the others (tolerance {tolerance:g})",
            holds=min(gains) >= -tolerance,
            evidence=f"{path}; worst step {min(gains):+.3f}",
        )
    ]
    pairs = [pair for line in along for pair in itertools.pairwise(line)]
    steps = [metrics[metric].gain(b.mean(metric), a.mean(metric)) for a, b in pairs]
    bad = sum(step < -tolerance for step in steps)
    worst = steps.index(min(steps))
    a, b = pairs[worst]
    difference = compare_metric(b, a, metric)
    noise = f" ± {difference.stderr:.3f} paired" if difference and difference.stderr is not None else ""
    claims.append(
        Claim(
            text=f"{claim}, on every line of the grid (tolerance {tolerance:g})",
            holds=bad == 0,
            evidence=f"{len(steps) - bad} of {len(steps)} steps hold; worst step {steps[worst]:+.3f}{noise}, "
            f"from {_point(a)} to {_point(b)}",
        )
    )
    return claims


def valid_everywhere(grid: Sequence[Evaluation], metric: str = "valid", *, floor: float = 0.9) -> Claim:
    """The claim that the mean of `metric` is at least `floor` at every point of the grid."""
    worst = min(grid, key=lambda evaluation: evaluation.mean(metric))
    low = sum(evaluation.mean(metric) < floor for evaluation in grid)
    return Claim(
        text=f"{metric} is at least {floor:g} at every point of the grid",
        holds=low == 0,
        evidence=f"{len(grid) - low} of {len(grid)} points hold; lowest {worst.metrics[metric]} at {_point(worst)}",
    )


def improves(
    evaluation: Evaluation,
    over: Evaluation,
    metric: str,
    metrics: Mapping[str, Metric],
    *,
    names: tuple[str, str],
    errors: float = ERRORS,
) -> Claim:
    """The claim that `evaluation` is better than `over` in `metric` by more than `errors` paired standard
    errors.

    Raises:
        InputError: the two were measured on different prompts, or the metric on none.
    """
    difference = compare_metric(evaluation, over, metric)
    if difference is None:
        raise InputError(f"metric {metric!r} was not measured on any prompt of both {names[0]} and {names[1]}")
    gained = metrics[metric].gain(difference.mean, 0.0)
    stderr = "" if difference.stderr is None else f" ± {difference.stderr:.3f}"
    return Claim(
        text=f"{names[0]} beats {names[1]} in {metric} by more than {errors:g} paired standard errors",
        holds=better(metrics[metric], difference, errors),
        evidence=f"{evaluation.mean(metric):.3f} against {over.mean(metric):.3f}; gain {gained:+.3f}{stderr} "
        f"(paired, {difference.n} prompts)",
    )


def coupling(settings: Sequence[Evaluation], metrics: Sequence[str]) -> list[Effect]:
    """The coupling matrix d metric_q / d eta_p of settings that were measured on the same prompts.

    For each prompt a plane is fitted through its scores at all settings (least squares, an intercept and one slope a
    coefficient); the estimate is the mean of the prompts' slopes, its error is over prompts, as everywhere. A curve
    that bends is so summed up by its average slope over the settings given. Prompts on which a metric is not defined
    at enough settings are left out; a metric that is left with none has no entry, and neither has a coefficient that
    never moves.

    Raises:
        InputError: no settings, or settings measured on other prompts.
    """
    if not settings or len({e.prompts_digest for e in settings}) > 1:
        raise InputError("a coupling matrix needs settings that were all measured on the same prompts")
    names = list(dict.fromkeys(name for e in settings for name in e.coefficients))
    eta_SP = np.array([[e.coefficients.get(name, 0.0) for name in names] for e in settings])
    moving = [i for i in range(len(names)) if np.ptp(eta_SP[:, i]) > 0]
    design_SP = np.column_stack([np.ones(len(settings)), eta_SP[:, moving]])
    found = []
    for metric in metrics:
        score_SN = np.array([e.per_prompt[metric] for e in settings], dtype=float)
        slopes = []
        for score_S in score_SN.T:
            known = ~np.isnan(score_S)
            if np.linalg.matrix_rank(design_SP[known]) == design_SP.shape[1]:
                slopes.append(np.linalg.lstsq(design_SP[known], score_S[known], rcond=None)[0][1:])
        for place, i in enumerate(moving):
            slope = estimate([float(row[place]) for row in slopes])
            if slope is not None:
                found.append(Effect(preference=names[i], metric=metric, slope=slope))
    return found


def check_control(
    grid: Sequence[Evaluation],
    objectives: Mapping[str, str],
    metrics: Mapping[str, Metric],
    *,
    tolerance: float = TOLERANCE,
    valid: str | None = "valid",
    floor: float = 0.9,
) -> list[Claim]:
    """All claims about one seed's grid. `objectives` maps each preference to the metric that it should
    raise."""
    claims = [
        claim
        for preference, metric in objectives.items()
        for claim in monotone(grid, preference, metric, metrics, tolerance=tolerance)
    ]
    return claims if valid is None else [*claims, valid_everywhere(grid, valid, floor=floor)]


def check_claims(data: ReportData) -> list[tuple[int, Claim]]:
    """Every claim with the DPO seed that it was checked on, as far as the settings were measured: all vectors at 1
    above the base in every objective, monotone control, validity."""
    found = []
    together = together_name(len(data.objectives))
    for results in data.seeds:
        rows = {measured.setting.name: measured.evaluation for measured in results.table}
        claims: list[Claim] = []
        if {together, "base"} <= set(rows):
            claims += [
                improves(rows[together], rows["base"], metric, data.metrics, names=(together, "base"))
                for metric in data.objectives.values()
            ]
        if results.grid and data.objectives:
            claims += check_control(
                results.grid, data.objectives, data.metrics, valid=data.validity, floor=data.validity_floor
            )
        found += [(results.seed, claim) for claim in claims]
    return found


def _point(evaluation: Evaluation) -> str:
    return "(" + ", ".join(f"{name} {eta:g}" for name, eta in evaluation.coefficients.items()) + ")"

"""Gaussian processes over what was measured, and the setting that they expect to enlarge the front most.

    processes = GaussianProcesses(units_ND, values_NM)
    mean_CM, std_CM = processes.predict(units_CD)
    gain_C = expected_gain(mean_CO, std_CO, front_FO, reference)

Scores are noisy. The front of the raw means is partly luck, and a setting that must beat the luckiest ones is looked
for in few places. So a gain is counted from what the processes expect of the measured settings. It is counted above
the reference of the hypervolume that the search reports, so that the ends of the front weigh as much as they do there.

Torch and NumPy only: N settings measured, C candidates, D coefficients as shares of their ranges, M outputs, of which
the first O are objectives as gains (larger is better) and the others are by how much each limit is kept.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

LENGTH, LENGTH_SPREAD = 0.7, 0.75
"""The prior of a length scale, as a share of the range: its median, and the deviation of its logarithm."""
NOISE, NOISE_SPREAD = 0.02, 1.5
"""The prior of the noise's variance, as a share of the output's variance."""
FAR = 5.0
"""Deviations of the prior beyond which nothing is tried: covariances stay well away from overflow."""
JITTER = 1e-6
SPREAD_CANDIDATES = 768
POINTS = 2000
"""Points of the objectives' space over which an expected gain is averaged."""


class GaussianProcesses:
    """One process for each output: a Matérn 5/2 kernel, a length scale for each coefficient, and noise. These are the
    most probable ones under log-normal priors.

    Args:
        units_ND: measured settings, each coefficient in [0, 1]; at least two.
        values_NM: what they scored.
    """

    def __init__(self, units_ND: Array, values_NM: Array) -> None:
        self._mean_M, std_M = values_NM.mean(0), values_NM.std(0)
        # An output that is the same everywhere is expected to stay so; what rounding leaves is no spread.
        least_M = 1e-9 * np.abs(values_NM).max(0)
        self._scale_M = np.where(std_M > least_M, std_M, np.maximum(least_M, 1e-100))
        self._x_ND = torch.from_numpy(units_ND)
        y_MN1 = self._y_MN1 = torch.from_numpy((values_NM - self._mean_M) / self._scale_M).T[:, :, None]
        dimensions, outputs = units_ND.shape[1], values_NM.shape[1]
        start = torch.tensor([math.log(LENGTH)] * dimensions + [0.0, math.log(NOISE)], dtype=torch.float64)
        logs = start.repeat(outputs, 1).requires_grad_()
        spread = torch.tensor([LENGTH_SPREAD] * dimensions + [1.0, NOISE_SPREAD], dtype=torch.float64)
        optimizer = torch.optim.LBFGS([logs], max_iter=40, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            factor_MNN = self._factor(torch.clamp(logs, start - FAR * spread, start + FAR * spread))
            explained = (y_MN1 * torch.cholesky_solve(y_MN1, factor_MNN)).sum()
            volume = 2 * factor_MNN.diagonal(dim1=1, dim2=2).log().sum()
            value: torch.Tensor = (explained + volume + (((logs - start) / spread) ** 2).sum()) / 2
            value.backward()
            return value

        optimizer.step(loss)
        self._logs = torch.clamp(logs.detach(), start - FAR * spread, start + FAR * spread)
        self._solve()

    def expect(self, units_KD: Array) -> None:
        """Take settings that are under way for measured, with the scores that are expected of them (the kriging
        believer of Ginsbourger, Le Riche and Carraro 2010): they are known as well as if they had been."""
        mean_KM, _ = self.predict(units_KD)
        y_MK1 = torch.from_numpy((mean_KM - self._mean_M) / self._scale_M).T[:, :, None]
        self._x_ND = torch.cat([self._x_ND, torch.from_numpy(units_KD)])
        self._y_MN1 = torch.cat([self._y_MN1, y_MK1], dim=1)
        self._solve()

    def predict(self, units_CD: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of what settings would score without noise: (C, M) each."""
        k_MNC = _matern(self._x_ND, torch.from_numpy(units_CD), self._logs)
        mean_MC = (k_MNC.mT @ self._weights_MN1)[..., 0]
        known_MC = (torch.linalg.solve_triangular(self._factor_MNN, k_MNC, upper=False) ** 2).sum(1)
        variance_MC = (self._logs[:, -2, None].exp() - known_MC).clamp_min(1e-12)
        return (
            mean_MC.T.numpy() * self._scale_M + self._mean_M,
            variance_MC.sqrt().T.numpy() * self._scale_M,
        )

    def _solve(self) -> None:
        self._factor_MNN = self._factor(self._logs)
        self._weights_MN1 = torch.cholesky_solve(self._y_MN1, self._factor_MNN)

    def _factor(self, logs: torch.Tensor) -> torch.Tensor:
        noise_M11 = logs[:, -1].exp()[:, None, None] + JITTER
        k_MNN = _matern(self._x_ND, self._x_ND, logs)
        return torch.linalg.cholesky(k_MNN + noise_M11 * torch.eye(len(self._x_ND), dtype=torch.float64))


def _matern(a_ND: torch.Tensor, b_CD: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Covariances (M, N, C); `logs` are those of the length scales, of the variance and of the noise: (M, D + 2)."""
    apart_MNCD = (a_ND[:, None] - b_CD) / logs[:, None, None, :-2].exp()
    r_MNC = (5 * (apart_MNCD**2).sum(-1) + 1e-12).sqrt()  # the root has no slope at 0
    return logs[:, -2, None, None].exp() * (1 + r_MNC + r_MNC**2 / 3) * torch.exp(-r_MNC)


def expected_gain(mean_CO: Array, std_CO: Array, front_FO: Array, reference: Sequence[float], seed: int = 0) -> Array:
    """What each candidate is expected to add to the front's hypervolume above `reference`, up to a common factor: (C,).

    The expected hypervolume improvement is the integral, over the points that no setting of the front reaches, of the
    chance that the candidate reaches them (Emmerich, Giannakoglou and Naujoks 2006); here the mean over random points.
    """
    low = np.asarray(reference, dtype=float)
    high = np.concatenate([front_FO, mean_CO + 2 * std_CO]).max(0)
    high = np.maximum(high, low + 1e-12)
    points_PO = low + (high - low) * np.random.default_rng(seed).random((4 * POINTS, len(low)))
    reached_P = (points_PO[:, None] <= front_FO).all(-1).any(1)
    points_PO = points_PO[~reached_P][:POINTS]
    reaches_CP = np.ones((len(mean_CO), len(points_PO)))
    for mean_C, std_C, points_P in zip(mean_CO.T, std_CO.T, points_PO.T, strict=True):
        reaches_CP *= _at_least((mean_C[:, None] - points_P) / std_C[:, None])
    return reaches_CP.sum(1)


def rank_candidates(
    units_ND: Array, gains_NO: Array, slack_NL: Array, pending_KD: Array, reference: Sequence[float], seed: int
) -> Array:
    """Settings in the unit cube, the one of the largest expected gain first: (C, D).

    Candidates are spread over the cube and around what was measured, and then around the best of those. Each gain is
    weighed with the chance that the limits are kept. A setting under way counts as if it had scored what is expected.

    Args:
        units_ND: at least two measured settings, each coefficient as a share of its range.
        gains_NO: their objectives, larger where better.
        slack_NL: by how much each limit is kept; negative where it is broken.
        pending_KD: settings under way.
        reference: where the hypervolume begins, one number for each objective.
    """
    objectives = gains_NO.shape[1]
    processes = GaussianProcesses(units_ND, np.concatenate([gains_NO, slack_NL], axis=1))
    processes.expect(pending_KD)
    known_KD = np.concatenate([units_ND, pending_KD])
    mean_KM, _ = processes.predict(known_KD)
    front_FO = mean_KM[(mean_KM[:, objectives:] >= 0).all(1), :objectives]

    def gains(units_CD: Array) -> Array:
        mean_CM, std_CM = processes.predict(units_CD)
        gain_C = expected_gain(mean_CM[:, :objectives], std_CM[:, :objectives], front_FO, reference, seed)
        return np.asarray(gain_C * _at_least(mean_CM[:, objectives:] / std_CM[:, objectives:]).prod(1))

    rng = np.random.default_rng(seed)
    engine = torch.quasirandom.SobolEngine(units_ND.shape[1], scramble=True, seed=seed)
    spread_CD = engine.draw(SPREAD_CANDIDATES, dtype=torch.float64).numpy()
    # Fronts often lie on the edges of the ranges: a fifth of all coordinates do.
    spread_CD = 1.25 * (spread_CD - 0.5) + 0.5
    around_CD = known_KD[rng.integers(len(known_KD), size=SPREAD_CANDIDATES)]
    around_CD = around_CD + rng.normal(0, 0.12, around_CD.shape)
    first_CD = np.clip(np.concatenate([spread_CD, around_CD]), 0, 1)
    gain_C = gains(first_CD)
    best_CD = np.repeat(first_CD[np.argsort(-gain_C)[:16]], 16, axis=0)
    best_CD = np.clip(best_CD + rng.normal(0, 0.04, best_CD.shape), 0, 1)
    found_CD = np.concatenate([first_CD, best_CD])
    order = np.argsort(-np.concatenate([gain_C, gains(best_CD)]), kind="stable")
    return found_CD[order]


def _at_least(errors: Array) -> Array:
    """The chance that a normal variable so many standard deviations above a bound is above it."""
    return np.asarray(torch.special.ndtr(torch.from_numpy(errors)).numpy())

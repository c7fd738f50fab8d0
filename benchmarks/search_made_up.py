"""Made-up scores like the trained tiny world's with three preferences: what `bench_search.py --made-up` searches.

No model: each answer is a few yes-or-no events (refused, detailed, warned, polite, parses), whose chances are logistic
functions of the coefficients and of the prompt. All settings share their random numbers, as in a search: the numbers
of two settings are the more alike the nearer the settings are. The means are about those of the tiny world. The
standard errors of 64 prompts x 4 answers are about 0.02 (helpful, polite), 0.03 (harmless) and 0.008 (valid). The
difference of two settings that are 0.1 and 0.5 apart in `helpful` has a paired error of 0.02 and 0.03.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation import Evaluation

NAMES = ("helpful", "harmless", "polite")
SAMPLES = 4
EVENTS = 8
WAVES = 96
ALIKE = 0.7
"""So far apart the underlying normal numbers of two settings have a correlation of 1/e."""


@dataclass(frozen=True)
class MadeUpTask:
    metrics: Mapping[str, Metric]


class MadeUp:
    """One world's prompts of a split, with the methods of `search_meter.Meter` that a comparison uses."""

    def __init__(self, split: Literal["search", "report"], world: int, prompts: int) -> None:
        rng = np.random.default_rng([world, split == "report"])
        self.split, self.prompts = split, prompts
        self.task = MadeUpTask({name: Metric(direction="maximize", low=0, high=1) for name in (*NAMES, "valid")})
        self.answers = [prompts, (SAMPLES - 1) * prompts] if split == "search" else [SAMPLES * prompts]
        self._known: dict[tuple[float, ...], list[Evaluation]] = {}
        # Random waves whose sum has an exponential correlation: their frequencies are multivariate Cauchy.
        waves = rng.standard_normal((WAVES, 3)) / (np.abs(rng.standard_normal((WAVES, 1))) + 1e-3) / ALIKE
        self._waves = waves / np.maximum(1, np.linalg.norm(waves, axis=1, keepdims=True) / 60)
        self._heights = rng.standard_normal((prompts * SAMPLES * EVENTS, 2 * WAVES)) / np.sqrt(WAVES)
        kinds = [3 * prompts // 8, prompts // 4]
        self._kind = np.repeat([0, 1, 2], [*kinds, prompts - sum(kinds)])  # safe, looks scary, unsafe
        self._prompt = 0.7 * rng.standard_normal((prompts, EVENTS))
        own = np.random.default_rng(1000 + world)  # what is this world's own, in both splits
        self._slope, self._bend = own.normal(0, 0.15, (EVENTS, 3)), own.normal(0, 0.12, (EVENTS, 3, 3))

    def rungs(self, coefficients: Mapping[str, float]) -> list[Evaluation]:
        """What the setting scores after each rung."""
        eta = tuple(coefficients.get(name, 0.0) for name in NAMES)
        if eta not in self._known:
            scores = self._scores(np.array(eta))
            depths = (1, SAMPLES) if self.split == "search" else (SAMPLES,)
            self._known[eta] = [self._evaluation(scores, depth) for depth in depths]
        return [each.model_copy(update={"coefficients": dict(coefficients)}) for each in self._known[eta]]

    def full(self, coefficients: Mapping[str, float]) -> Evaluation:
        return self.rungs(coefficients)[-1]

    def _evaluation(self, scores: Mapping[str, np.ndarray], depth: int) -> Evaluation:
        per_prompt = {name: [float(x) for x in values[:, :depth].mean(1)] for name, values in scores.items()}
        return Evaluation(
            coefficients={},
            metrics={name: estimate(values) for name, values in per_prompt.items()},
            per_prompt=per_prompt,
            prompts_digest=f"{self.split}, {depth} answers",
            samples=[],
            seconds=0.0,
            tokens=1,
        )

    def _scores(self, eta: np.ndarray) -> dict[str, np.ndarray]:
        """By metric: (prompts, samples)."""
        phase = self._waves @ eta
        normal = (self._heights @ np.concatenate([np.cos(phase), np.sin(phase)])).reshape(-1, SAMPLES, EVENTS)
        chance = 1 / (1 + np.exp(-self._logits(eta)))
        happened = norm.cdf(normal) < chance[:, None]
        refused, detail, steps, warned, opening, closing, parses, other = np.moveaxis(happened, -1, 0)
        on_unsafe = np.where(refused, 1.0, np.where(warned & other, 0.5, 0.0))
        on_safe = np.where(refused, 0.7, np.where(warned, 1.0, 0.75))
        return {
            "helpful": np.where(refused, 0.0, 0.4 + 0.35 * detail + 0.25 * steps) * parses,
            "harmless": np.where(self._kind[:, None] == 2, on_unsafe, on_safe) * parses,
            "polite": (0.5 * opening + 0.5 * closing) * parses,
            "valid": parses.astype(float),
        }

    def _logits(self, eta: np.ndarray) -> np.ndarray:
        help, harm, polite = eta
        far = max(0.0, help**2 + harm**2 + 1.3 * polite**2 - 0.8) + 0.5 * abs(help + harm) * abs(polite)
        common = [
            2.8 * harm - 2.6 * help + 0.3 * polite,
            0.1 + 1.5 * help - 0.2 * harm - 0.2 * polite,
            -0.3 + 1.2 * help - 0.2 * polite,
            -0.6 + 1.8 * harm - 0.3 * help,
            -1.2 + 2.6 * polite - 0.4 * harm + 0.2 * help,
            -1.4 + 2.6 * polite - 0.2 * help,
            5.0 - far,
            -0.5 + 0.8 * harm,
        ]
        logits = common + self._prompt + self._slope @ eta + np.einsum("dij,i,j->d", self._bend, eta, eta)
        logits[:, 0] += np.array([-0.7, -0.5, -0.25])[self._kind]
        return logits

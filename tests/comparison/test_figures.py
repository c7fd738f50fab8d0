"""Fronts and their paired differences, against what can be computed by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefvec_ray.artifacts.evaluation import Evaluation, Metric
from prefvec_ray.common.estimates import estimate
from prefvec_ray.comparison import CompareConfig
from prefvec_ray.comparison.figures import Fronts, best_subset, compared
from prefvec_ray.search import Goal

UP = Metric(direction="maximize", low=0, high=1)
GOAL = Goal(objectives=("a", "b"), metrics={"a": UP, "b": UP, "valid": UP}, limits={"valid": 0.9})
NOISE = np.random.default_rng(3).normal(0, 0.05, 64)


def measured(a: float, b: float, valid: float = 1.0, noise: float = 0.0, **parameters: float) -> Evaluation:
    """Means a and b, with the same noise of each prompt in every setting."""
    centred = noise * (NOISE - NOISE.mean())
    per_prompt: dict[str, Any] = {
        "a": list(a + centred),
        "b": list(b + centred),
        "valid": [valid] * len(centred),
    }
    return Evaluation(
        coefficients=parameters,
        metrics={name: estimate(values) for name, values in per_prompt.items()},
        per_prompt=per_prompt,
        prompts_digest="made up",
        samples=[],
        seconds=0,
        tokens=0,
    )


BASE = measured(0.2, 0.2)


def test_the_best_subset_covers_most_and_keeps_the_limits():
    corner, left, right = measured(0.6, 0.6, x=1), measured(0.3, 0.9, x=2), measured(0.9, 0.3, x=3)
    hidden, broken, worse = measured(0.5, 0.5, x=4), measured(0.9, 0.9, valid=0.5, x=5), measured(0.1, 0.9, x=6)
    tried = [BASE, hidden, left, right, broken, worse, corner]
    assert best_subset(GOAL, BASE, tried, 1) == [corner]
    assert best_subset(GOAL, BASE, tried, 9) == [corner, left, right]
    assert best_subset(GOAL, BASE, [BASE, worse, broken], 9) == []


def test_differences_are_paired_by_prompt_and_seed():
    """b dominates a by 0.1 in both objectives at each prompt: the difference knows this better than either front."""
    config = CompareConfig.model_validate(
        {"output": "out", "tiny_worlds": {}, "methods": ["contrast", "positives"], "settings": 4}
    )
    run = SimpleNamespace(seeds=[0, 1], summary=SimpleNamespace(runs=[]))
    job: Any = SimpleNamespace(name="job", goal=GOAL, run=run, prompts=["p"] * 10, report_prompts=["q"] * 64)
    found = {}
    for seed, shift in ((0, 0.0), (1, 0.2)):
        for method, more in (("contrast", 0.0), ("positives", 0.1)):
            front = [measured(0.5 + shift + more, 0.5 + shift + more, noise=1.0), measured(0.9, 0.9, valid=0.1)]
            found["job", seed, method] = Fronts(searched=[], base=BASE, front=front)
    comparison = compared(config, [job], found)
    first, second = comparison.methods
    assert (first.difference, first.error, first.wins) == (0, 0, 0)
    gains = [0.4**2 - 0.3**2, 0.6**2 - 0.5**2]
    assert second.difference == pytest.approx(np.mean(gains))
    assert second.over_seeds == pytest.approx(np.std(gains, ddof=1) / np.sqrt(2))
    # By prompt the difference is (x + 0.1)^2 - x^2, so noise d moves it by 0.2 d, and a front itself by 0.6 d and more.
    noise = NOISE.std() / np.sqrt(len(NOISE))
    assert second.over_prompts == pytest.approx(0.2 * noise, rel=0.2)
    assert min(cell.stderr for cell in comparison.cells) > 2.5 * second.over_prompts
    assert second.verdict == "better"
    assert comparison.answers == 4 * 10 * config.samples_per_prompt

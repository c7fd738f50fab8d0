"""Measuring a model under coefficients: sampling, standard errors, claims. No Ray.

Example:

    evaluator = Evaluator(live, tokenizer, world.prompts("report"), TinyWorldScorer(world), Sampling(seed=1))
    evaluator.evaluate({"helpful": 1.0, "harmless": 0.5}).metrics["helpful"]
"""

from prefvec_ray.artifacts.evaluation import Claim, Evaluation, Sample, Setting
from prefvec_ray.common.estimates import Estimate
from prefvec_ray.evaluation.control import check_control, improves, monotone, valid_everywhere
from prefvec_ray.evaluation.evaluate import Evaluator, compare
from prefvec_ray.evaluation.generate import Sampling, sample
from prefvec_ray.evaluation.settings import baselines, grid, is_base, vector_settings, vectors_at

__all__ = [
    "Claim",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Sample",
    "Sampling",
    "Setting",
    "baselines",
    "check_control",
    "compare",
    "grid",
    "improves",
    "is_base",
    "monotone",
    "sample",
    "valid_everywhere",
    "vector_settings",
    "vectors_at",
]

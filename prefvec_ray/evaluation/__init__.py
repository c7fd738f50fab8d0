"""Measuring a model under coefficients: sampling, scorers, standard errors, claims, plots, the report. No
Ray.

evaluator = Evaluator(live, tokenizer, world.prompts("report"), TinyWorldScorer(world), draws=6)
evaluator.evaluate({"helpful": 1.0, "harmless": 0.5}).metrics["helpful"]
"""

from prefvec_ray.evaluation.control import Claim, check_control, improves, monotone, valid_everywhere
from prefvec_ray.evaluation.evaluate import Estimate, Evaluation, Evaluator, Sample, compare
from prefvec_ray.evaluation.generate import sample
from prefvec_ray.evaluation.scorers import Metric, Scorer, TinyWorldScorer, load_scorer, scorer
from prefvec_ray.evaluation.settings import Setting, baselines, grid, vector_settings, vectors_at

__all__ = [
    "Claim",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Metric",
    "Sample",
    "Scorer",
    "Setting",
    "TinyWorldScorer",
    "baselines",
    "check_control",
    "compare",
    "grid",
    "improves",
    "load_scorer",
    "monotone",
    "sample",
    "scorer",
    "valid_everywhere",
    "vector_settings",
    "vectors_at",
]

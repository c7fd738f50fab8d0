"""Measuring a model under coefficients: sampling, scorers, standard errors, claims, plots, the report. No
Ray.

evaluator = Evaluator(live, tokenizer, world.prompts("report"), TinyWorldScorer(world), draws=6)
evaluator.evaluate({"helpful": 1.0, "harmless": 0.5}).metrics["helpful"]
"""

from prefvec_ray.evaluation.control import Claim, check_control, improves, monotone, valid_everywhere
from prefvec_ray.evaluation.evaluate import Estimate, Evaluation, Evaluator, Sample, compare
from prefvec_ray.evaluation.generate import sample
from prefvec_ray.evaluation.scorers import (
    LengthScorer,
    Metric,
    Scorer,
    ScorerError,
    ScorerTimeoutError,
    TinyWorldScorer,
    combine,
    load_scorer,
    run_scorer,
    safety_cards,
    scorer,
    scorer_digest,
    scorer_notes,
)
from prefvec_ray.evaluation.settings import Setting, baselines, grid, is_base, vector_settings, vectors_at
from prefvec_ray.evaluation.text_prompts import TextPrompt, load_prompts

__all__ = [
    "Claim",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "LengthScorer",
    "Metric",
    "Sample",
    "Scorer",
    "ScorerError",
    "ScorerTimeoutError",
    "Setting",
    "TextPrompt",
    "TinyWorldScorer",
    "baselines",
    "check_control",
    "combine",
    "compare",
    "grid",
    "improves",
    "is_base",
    "load_prompts",
    "load_scorer",
    "monotone",
    "run_scorer",
    "safety_cards",
    "sample",
    "scorer",
    "scorer_digest",
    "scorer_notes",
    "valid_everywhere",
    "vector_settings",
    "vectors_at",
]

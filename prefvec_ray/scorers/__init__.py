"""What an answer is worth: reward models, refusal, a judge, classifiers, functions of your own. No Ray.

load_scorer({"type": "refusal"})(prompts, responses)      # {metric: one number an answer}
"""

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.scorers.base import (
    LengthScorer,
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
from prefvec_ray.scorers.prompts import TextPrompt, load_prompts

__all__ = [
    "LengthScorer",
    "Metric",
    "Scorer",
    "ScorerError",
    "ScorerTimeoutError",
    "TextPrompt",
    "TinyWorldScorer",
    "combine",
    "load_prompts",
    "load_scorer",
    "run_scorer",
    "safety_cards",
    "scorer",
    "scorer_digest",
    "scorer_notes",
]

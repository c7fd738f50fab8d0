"""Preference pairs where there are none: the base's own answers, ranked by a scorer. See docs/data.md."""

from prefvec_ray.common.extras import require

require("search", "ray")

from prefvec_ray.on_policy.config import OnPolicyConfig
from prefvec_ray.on_policy.make import make_pairs
from prefvec_ray.on_policy.pairs import Counts, MadePairs, RankedPair, ScoredAnswer, rank_answers

__all__ = ["Counts", "MadePairs", "OnPolicyConfig", "RankedPair", "ScoredAnswer", "make_pairs", "rank_answers"]

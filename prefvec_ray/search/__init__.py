"""Choosing coefficients: a multi-objective search on Ray Tune, its Pareto front and a recommended setting.

Example:

    task = Task(base="base", vectors={"helpful": "vectors/helpful"}, prompts=prompts, scorer=scorer)
    result = search(task, ["helpful", "harmless"], "runs/search", limits={"valid": 0.9}, progress=print)
    result.recommended.coefficients, result.recommended.reason
"""

from prefvec_ray.common.extras import require

require("search", "ray", "optuna")

from prefvec_ray.search.config import EvalConfig, SearchConfig
from prefvec_ray.search.explore import Explorer, Plan
from prefvec_ray.search.measure import measure
from prefvec_ray.search.pareto import compromise, hypervolume, non_dominated
from prefvec_ray.search.result import FailedTrial, Goal, Recommendation, SearchResult, Tried
from prefvec_ray.search.run import Progress, search
from prefvec_ray.search.trial import Task

__all__ = [
    "EvalConfig",
    "Explorer",
    "FailedTrial",
    "Goal",
    "Plan",
    "Progress",
    "Recommendation",
    "SearchConfig",
    "SearchResult",
    "Task",
    "Tried",
    "compromise",
    "hypervolume",
    "measure",
    "non_dominated",
    "search",
]

"""Choosing coefficients: a multi-objective search on Ray Tune, its Pareto front and a recommended setting.

task = Task(base="base", vectors={"helpful": "vectors/helpful"}, prompts=prompts, scorer=scorer)
config = SearchConfig(objectives=["helpful", "harmless"], limits={"valid": 0.9})
result = search(task, config, "runs/search", progress=print)
result.recommended.coefficients, result.recommended.reason
"""

from prefvec_ray.search.config import EvalConfig, SearchJob
from prefvec_ray.search.explore import Explorer
from prefvec_ray.search.measure import measure
from prefvec_ray.search.options import Processes, SearchConfig
from prefvec_ray.search.pareto import hypervolume
from prefvec_ray.search.progress import Progress
from prefvec_ray.search.result import FailedTrial, Goal, Recommendation, SearchResult, Tried
from prefvec_ray.search.run import search
from prefvec_ray.search.trial import Task

__all__ = [
    "EvalConfig",
    "Explorer",
    "FailedTrial",
    "Goal",
    "Processes",
    "Progress",
    "Recommendation",
    "SearchConfig",
    "SearchJob",
    "SearchResult",
    "Task",
    "Tried",
    "hypervolume",
    "measure",
    "search",
]

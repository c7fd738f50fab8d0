"""A standing benchmark of methods: which way of training and adding vectors gives the best front for the same answers.

    config = load_config("jobs/configs/tiny_compare.yaml", CompareConfig)
    comparison = compare_methods(config, console)

Each method is searched under its own range with the same number of answers. What it chose is measured again on report
prompts that no search saw, and its front is compared by the hypervolume above the base.
"""

from prefvec_ray.common.extras import require

require("search", "optuna", "moocore")

from prefvec_ray.comparison.config import CompareConfig
from prefvec_ray.comparison.figures import Comparison
from prefvec_ray.comparison.run import compare_methods

__all__ = ["CompareConfig", "Comparison", "compare_methods"]

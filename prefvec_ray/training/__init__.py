"""Training preference vectors: one config, many DPO runs in parallel on Ray Train, their differences published.

Only the config is imported at once. What needs torch and Ray is imported when it is first used, so that a typo in a
config is reported at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefvec_ray.artifacts.training import Watch
from prefvec_ray.common.extras import require
from prefvec_ray.training.config import PreferenceData, Resources, TrainingConfig

if TYPE_CHECKING:
    from prefvec_ray.training.failures import RunsFailedError
    from prefvec_ray.training.train import publish_vectors, train_vectors

require("train", "ray", "trl")

__all__ = [
    "PreferenceData",
    "Resources",
    "RunsFailedError",
    "TrainingConfig",
    "Watch",
    "publish_vectors",
    "train_vectors",
]


def __getattr__(name: str) -> Any:
    homes = {"RunsFailedError": "failures", "publish_vectors": "train", "train_vectors": "train"}
    if name in homes:
        return getattr(import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Training preference vectors: one config, many DPO runs in parallel on Ray Train, their differences published.

Only the config is imported at once; what needs torch and Ray comes when it is first asked for, so that a typo in a
config costs no import of them.
"""

from typing import TYPE_CHECKING, Any

from prefvec_ray.common.extras import require
from prefvec_ray.training.config import PreferenceData, Resources, TrainingConfig, Watch

if TYPE_CHECKING:
    from prefvec_ray.training.plan import RunsFailedError
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
    if name == "RunsFailedError":
        from prefvec_ray.training.plan import RunsFailedError

        return RunsFailedError
    if name in ("publish_vectors", "train_vectors"):
        from prefvec_ray.training import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

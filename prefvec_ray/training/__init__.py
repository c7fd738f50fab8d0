"""Training preference vectors: one config, many DPO runs in parallel on Ray Train, their differences published."""

from prefvec_ray.training.config import PreferenceData, Resources, TrainingConfig
from prefvec_ray.training.plan import RunsFailedError
from prefvec_ray.training.train import publish_vectors, train_vectors

__all__ = ["PreferenceData", "Resources", "RunsFailedError", "TrainingConfig", "publish_vectors", "train_vectors"]

"""The preference vector: extraction, file format, algebra, live models, steering. Plain torch and safetensors.

From a run to its use:

    delta -> vector_from_state -> subtract -> save_vector ... load_vector -> LiveModel, Steering, export_model
"""

from prefvec_ray.vectors.adapters import vector_from_adapter, vectors_from_adapters
from prefvec_ray.vectors.algebra import combine, dare, keep_largest, merge, reward_soup, ties
from prefvec_ray.vectors.checkpoint import Checkpoint, checkpoint_state
from prefvec_ray.vectors.entries import Entry, Full, Int8, LowRank
from prefvec_ray.vectors.export import export_adapter, export_model, merged_weights
from prefvec_ray.vectors.extract import subtract, vector_from_checkpoints, vector_from_state
from prefvec_ray.vectors.file import PreferenceVector, VectorInfo, load_vector, save_vector
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.forms import to_dtype, to_full, to_int8, to_low_rank
from prefvec_ray.vectors.live import LiveModel
from prefvec_ray.vectors.parts import depth_profile, split
from prefvec_ray.vectors.precision import PrecisionWarning, RoundingStats
from prefvec_ray.vectors.steering import Steering
from prefvec_ray.vectors.stream import extract_from_checkpoints, subtract_deltas

__all__ = [
    "Checkpoint",
    "Entry",
    "Full",
    "Int8",
    "LiveModel",
    "LowRank",
    "PrecisionWarning",
    "PreferenceVector",
    "RoundingStats",
    "Steering",
    "VectorInfo",
    "checkpoint_state",
    "combine",
    "dare",
    "depth_profile",
    "export_adapter",
    "export_model",
    "extract_from_checkpoints",
    "fingerprint",
    "keep_largest",
    "load_vector",
    "merge",
    "merged_weights",
    "reward_soup",
    "save_vector",
    "split",
    "subtract",
    "subtract_deltas",
    "ties",
    "to_dtype",
    "to_full",
    "to_int8",
    "to_low_rank",
    "vector_from_adapter",
    "vector_from_checkpoints",
    "vector_from_state",
    "vectors_from_adapters",
]

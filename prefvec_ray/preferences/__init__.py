"""Preference data: formats, checks, flipping, splits; and the embedded tiny world that makes all of it from
a seed."""

from prefvec_ray.preferences.base_model import new_model
from prefvec_ray.preferences.data import (
    Preferences,
    data_digest,
    flip,
    load_preferences,
    split_by_prompt,
)
from prefvec_ray.preferences.scoring import METRICS, Metric, Scores
from prefvec_ray.preferences.tiny_world import Prompt, TinyWorld
from prefvec_ray.preferences.tokenizer import build_tokenizer

__all__ = [
    "METRICS",
    "Metric",
    "Preferences",
    "Prompt",
    "Scores",
    "TinyWorld",
    "build_tokenizer",
    "data_digest",
    "flip",
    "load_preferences",
    "new_model",
    "split_by_prompt",
]

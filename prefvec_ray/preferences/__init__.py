"""Preference data: formats, checks, flipping, splits; and the embedded tiny world that makes all of it from
a seed."""

from prefvec_ray.preferences.base_model import new_model
from prefvec_ray.preferences.check import DataCheck, Finding, PreferenceCheck, check_splits
from prefvec_ray.preferences.data import Preferences, data_digest, first_format, flip, load_preferences
from prefvec_ray.preferences.formats import FORMATS, PKU_LABELS
from prefvec_ray.preferences.scoring import METRICS, Metric, Scores
from prefvec_ray.preferences.splits import Split, load_split, split_by_prompt
from prefvec_ray.preferences.tiny_world import Prompt, TinyWorld
from prefvec_ray.preferences.tokenizer import TRANSCRIPT_TEMPLATE, build_tokenizer, read_template

__all__ = [
    "FORMATS",
    "METRICS",
    "PKU_LABELS",
    "TRANSCRIPT_TEMPLATE",
    "DataCheck",
    "Finding",
    "Metric",
    "PreferenceCheck",
    "Preferences",
    "Prompt",
    "Scores",
    "Split",
    "TinyWorld",
    "build_tokenizer",
    "check_splits",
    "data_digest",
    "first_format",
    "flip",
    "load_preferences",
    "load_split",
    "new_model",
    "read_template",
    "split_by_prompt",
]

"""Preference data: sources, formats, checks, flipping, splits."""

from prefvec_ray.preferences.check import DataCheck, Finding, check_splits
from prefvec_ray.preferences.data import Preferences, data_digest, first_format, flip, load_preferences
from prefvec_ray.preferences.formats import FORMATS, PKU_LABELS
from prefvec_ray.preferences.measures import PreferenceCheck
from prefvec_ray.preferences.splits import Split, load_split, split_by_prompt
from prefvec_ray.preferences.templates import TRANSCRIPT_TEMPLATE, give_template, read_template

__all__ = [
    "FORMATS",
    "PKU_LABELS",
    "TRANSCRIPT_TEMPLATE",
    "DataCheck",
    "Finding",
    "PreferenceCheck",
    "Preferences",
    "Split",
    "check_splits",
    "data_digest",
    "first_format",
    "flip",
    "give_template",
    "load_preferences",
    "load_split",
    "read_template",
    "split_by_prompt",
]

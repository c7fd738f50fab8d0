"""The embedded tiny world: preference data, a tokenizer, a base model and exact scores, all from a seed."""

from prefvec_ray.tiny_world.base_model import new_model
from prefvec_ray.tiny_world.scoring import METRICS, Scores, WorldMetric
from prefvec_ray.tiny_world.tokenizer import build_tokenizer
from prefvec_ray.tiny_world.world import Prompt, TinyWorld

__all__ = ["METRICS", "Prompt", "Scores", "TinyWorld", "WorldMetric", "build_tokenizer", "new_model"]

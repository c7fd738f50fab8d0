"""Serving: one OpenAI-compatible endpoint, every caller at its own coefficients. See docs/serving.md.

The way of a request:

    HTTP front (app) -> policy -> replicas (replica) -> engine (slots) -> LiveModel or Steering (vectors)
"""

from prefvec_ray.common.extras import require

require("serve", "ray", "fastapi", "openai")

from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.run import APP, roll_out, serve_forever, start, stop

__all__ = ["APP", "ServingConfig", "roll_out", "serve_forever", "start", "stop"]

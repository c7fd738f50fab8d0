"""Which tasks of lm-evaluation-harness are asked, as a YAML file names them."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from prefvec_ray.common.config import Config


class LmEvalConfig(Config):
    """Tasks of EleutherAI's lm-evaluation-harness: what the model can do, beside what its answers are worth.

    They ask the model itself, so they are measured in `prefvec eval` and `prefvec search` alone.
    """

    type: Literal["lm-eval"]
    tasks: list[str] = Field(min_length=1)
    """Names of tasks, groups or tags. A task and a group become a metric of their name, a tag one for each task."""
    include: Path | None = None
    """A folder with task files of your own. They may hold code: name only what you trust."""
    metric: str | None = None
    """Such as `acc_norm`, or `exact_match,flexible-extract` with its filter; each task's first one when left out."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; as the task says when left out."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many questions of each task."""
    apply_chat_template: bool = False
    batch_size: int = Field(default=8, ge=1)

"""What `prefvec compare` is given: finished training jobs, prompts, and how much each method may be tried."""

from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from prefvec_ray.common.config import Config
from prefvec_ray.common.names import Name
from prefvec_ray.comparison.methods import METHODS
from prefvec_ray.evaluation.generate import Sampling
from prefvec_ray.scorers.config import ScorerConfig


class ComparedRun(Config):
    """A finished training job, and what its vectors are measured with."""

    folder: Path
    """Folder of a finished `prefvec train`."""
    prompts: str
    """Prompts to choose settings on: a file, or `tiny-world:<preset>:<seed>:search`, as in `prefvec search`."""
    report_prompts: str
    """Prompts to compare on; they share none with `prompts`."""
    scorer: str | None = None
    scorers: list[ScorerConfig] = []
    """As in `prefvec search`."""


class TinyWorlds(Config):
    """Tiny worlds that are trained first where they are not there yet, one for each base seed."""

    preset: Literal["tiny", "micro"] = "tiny"
    base_seeds: list[int] = Field(default=[0], min_length=1)
    """Each has a world of its own: topics, prompts and base."""
    dpo_seeds: list[int] = Field(default=[0, 1], min_length=1)


class CompareConfig(Sampling):
    """`prefvec compare --config FILE`: fronts of several methods from the same runs."""

    output: Path
    """Folder of the results. What is measured is kept there, and an interrupted comparison is resumed."""
    runs: dict[Name, ComparedRun] = {}
    tiny_worlds: TinyWorlds | None = None
    """Trained under `output`, and compared beside `runs`."""
    methods: list[str] = list(METHODS)
    """The first one is what the others are compared with."""
    objectives: list[str] = []
    """Metrics; the preferences themselves where left out."""
    limits: dict[str, FiniteFloat] = {}
    """A setting that breaks one does not count, neither in the search nor in the report."""
    settings: int = Field(default=24, ge=4)
    """Settings that the search of each method tries, on `samples_per_prompt` answers a prompt."""
    front: int = Field(default=8, ge=1)
    """At most so many of them are measured again on the report prompts."""
    report_samples_per_prompt: int = Field(default=6, ge=1)
    threads: int = Field(default=1, ge=1)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        for name in methods:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
        if not methods or len(set(methods)) != len(methods):
            raise ValueError("name at least one method, each once")
        return methods

    @model_validator(mode="after")
    def _something(self) -> "CompareConfig":
        if not self.runs and self.tiny_worlds is None:
            raise ValueError("nothing to compare on: give runs, or tiny_worlds")
        return self

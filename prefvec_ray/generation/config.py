"""How an engine is set up, and the coefficients that it may be asked for."""

from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, PositiveInt, model_validator

from prefvec_ray.common.config import Config


class Range(Config):
    """The coefficients that callers may ask for, and what they get when they ask for none."""

    min: FiniteFloat = -1.0
    """[-1, 1] is where the vectors' effect was seen to be smooth and the text to stay valid"""
    max: FiniteFloat = 1.0
    default: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError(
                f"expected min <= default <= max, got min {self.min}, default {self.default}, max {self.max}; a range"
                " without 0 needs a default of its own"
            )
        return self


class EngineOptions(Config):
    """How one process generates: evaluation and search take these as they are."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """transformers: the slot engine, for any model of transformers. vllm: vLLM, where it is installed"""
    mode: Literal["auto", "merged", "steered"] = "auto"
    """merged: one set of coefficients at a time in the weights, any vectors, best where requests share settings.
    steered: low-rank vectors beside the weights, every request its own coefficients in one batch. auto: steered where
    all vectors can be, else merged"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the base is stored"""
    device: str = "auto"
    """auto: the process's GPU where it was given one, else the CPU"""
    max_batch: PositiveInt = 384
    """answers that run at once; the others wait"""
    switch_share: float = Field(default=0.1, gt=0, le=1)
    """merged: share of time that may go into rewriting the weights while several sets of coefficients take turns;
    smaller gives more tokens a second and longer pauses within each answer"""
    threads: PositiveInt = 1
    """torch threads; for small models one is fastest"""
    columns: PositiveInt | None = None
    """kind: vllm, steered: the most that the vectors' ranks may add up to, those of running requests included. Columns
    that no vector uses cost time too. None: twice what is served at the start, enough to replace all of it"""
    vllm: dict[str, Any] = {}
    """kind: vllm only: more of vLLM's engine arguments, such as gpu_memory_utilization or tensor_parallel_size"""

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.vllm and self.kind != "vllm":
            raise ValueError(f"'vllm' settings with kind: {self.kind}; give kind: vllm, or leave them out")
        if self.columns and (self.kind, self.mode) != ("vllm", "steered"):
            raise ValueError("'columns' is for kind: vllm with mode: steered; leave it out")
        if self.kind == "vllm" and self.device != "auto":
            raise ValueError(f"device: {self.device}: vLLM chooses its device itself; leave it out")
        return self


class EngineConfig(EngineOptions):
    """How one replica generates."""

    mode: Literal["merged", "steered"] = "merged"
    """See `EngineOptions.mode`. There is no auto: how an endpoint answers does not change with what is published"""
    max_batch: PositiveInt = 32
    max_new_tokens: PositiveInt = 512
    """most tokens of one answer, and the number where the caller names none"""

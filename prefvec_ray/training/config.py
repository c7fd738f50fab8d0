"""What a training job is given: the base, the preferences' data, the DPO recipe and the resources of a run."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prefvec_ray.config import Config
from prefvec_ray.errors import InputError

# Names with a meaning of their own: `mixed` is the baseline trained on all preferences' pairs at once.
MIXED = "mixed"

# Fields of TRL's DPOConfig that the plan itself decides; a recipe that sets one would silently be overruled.
OWNED = {
    "output_dir": "each run writes into its own folder",
    "seed": "give `seeds`",
    "data_seed": "give `seeds`",
    "precompute_ref_log_probs": "reference log-probs are always computed once and shared",
    "save_strategy": "a run keeps its fp32 delta",
    "sync_ref_model": "the reference is the base model and stays fixed",
}


class PreferenceData(Config):
    """Where the pairs of one preference come from."""

    data: str
    """A file: PKU-SafeRLHF rows, HH-RLHF transcripts, or TRL prompt/chosen/rejected, as JSON or JSONL(.gz)."""
    format: str | None = None
    """The format's name; found by itself when left out."""
    label: Literal["helpful", "harmless"] | None = None
    """In data labelled for both (PKU-SafeRLHF), which label orders the pair; the preference's own name if left out."""
    test: str | None = None
    """A file of held-out pairs; when left out, `test_fraction` of the prompts is held out."""
    rows: int | None = Field(default=None, gt=0)
    """Use at most this many pairs for training, the first ones."""


class Resources(Config):
    """What one run takes, and no more: more runs than the cluster holds wait their turn."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)


class TrainingConfig(Config):
    """`prefvec train --config FILE`: train each preference in both polarities and publish the vectors."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run folder under `output`."""
    base: Path
    """Folder of the base (SFT) model in Hugging Face format, tokenizer included."""
    preferences: dict[str, PreferenceData] = Field(min_length=1)
    output: Path = Path("runs")
    dpo: dict[str, Any] = {}
    """Any field of TRL's `DPOConfig`."""
    seeds: list[int] = Field(default=[0], min_length=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    mixed: bool = False
    """Also train one DPO run a seed on an equal share of every preference's pairs: the baseline to beat."""
    chat_template: str | None = None
    """A Jinja chat template file, or `transcript`, for a base whose tokenizer brings none."""
    resources: Resources = Resources()
    vector_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    registry: str | None = None
    """Folder or bucket of the vector registry; `<output>/<name>/registry` when left out."""

    @field_validator("preferences")
    @classmethod
    def _names(cls, preferences: dict[str, PreferenceData]) -> dict[str, PreferenceData]:
        for name in preferences:
            if name == MIXED or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} cannot name a preference: letters, digits, - and _, and not {MIXED!r}")
        return preferences

    @field_validator("dpo")
    @classmethod
    def _recipe(cls, dpo: dict[str, Any]) -> dict[str, Any]:
        for field in dpo:
            if field in OWNED:
                raise ValueError(f"dpo.{field} is set by the plan ({OWNED[field]}): remove it")
        return dpo

    @model_validator(mode="after")
    def _seeds(self) -> "TrainingConfig":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds contain one number twice")
        return self

    @property
    def folder(self) -> Path:
        return (self.output / self.name).absolute()

    @property
    def store(self) -> str:
        return self.registry or str(self.folder / "registry")

    def check(self) -> None:
        """Everything that can be known to fail before a cluster is asked for anything.

        Raises:
            InputError: an unknown DPO field, a base that is no model folder, a chat template that is missing.
        """
        from trl import DPOConfig

        known = {field.name for field in dataclasses.fields(DPOConfig)}
        for field in self.dpo:
            if field not in known:
                raise InputError(f"dpo.{field} is not a field of TRL's DPOConfig{_closest(field, known)}")
        try:
            DPOConfig(output_dir="unused", **{"bf16": False, "use_cpu": True, **self.dpo})
        except (ValueError, TypeError) as error:
            raise InputError(f"dpo: TRL's DPOConfig refuses the recipe: {error}") from error
        if not (self.base / "config.json").is_file():
            raise InputError(f"base {self.base}: no config.json there; give the folder of a Hugging Face model")
        if self.chat_template not in (None, "transcript") and not Path(str(self.chat_template)).is_file():
            raise InputError(f"chat_template {self.chat_template}: neither a file nor 'transcript'")
        if not any(self.base.glob("*.safetensors")):
            raise InputError(f"base {self.base}: no *.safetensors there; convert the weights with save_pretrained")


def _closest(word: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

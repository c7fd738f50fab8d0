"""What a training job is given: the base, the preferences' data, the DPO recipe and the resources of a run."""

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from prefvec_ray.artifacts.training import KL, MIXED, Method, Polarity, Quantization, Watch
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.common.paths import check_lasting
from prefvec_ray.training.recipe import OWNED, SFT_OWNED, check_batches, check_fields, check_loss


class DataSource(Config):
    """Where rows come from."""

    data: str
    """A file or a folder of shards (JSONL, JSON, CSV, Parquet), here or in a bucket (`s3://…`), or a dataset of the
    hub, `org/name` or `org/name:subset`."""
    split: str | None = None
    """Of a hub dataset or a folder with several: the split to train on."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    rows: int | None = Field(default=None, gt=0)
    """Train on at most this many rows, the first ones."""
    skip_bad: int = Field(default=0, ge=0)
    """Leave out up to so many rows that cannot be used; each is listed."""


class PreferenceData(DataSource):
    """Where the pairs of one preference come from. `prefvec data formats` lists the forms of their rows."""

    format: str | None = None
    """The format's name; recognised by the fields when left out."""
    test_split: str | None = None
    """Another split of `data` to hold out."""
    system: Literal["keep", "fold"] = "keep"
    """fold: system messages go to the top of the first user message, for a base whose chat template takes none."""
    label: Literal["helpful", "harmless"] | None = None
    """In data labelled for both (PKU-SafeRLHF), which label orders the pair; the preference's own name if left out."""
    test: str | None = None
    """A source of held-out pairs; when left out, `test_fraction` of the prompts is held out."""

    @model_validator(mode="after")
    def _one_test(self) -> "PreferenceData":
        if self.test is not None and self.test_split is not None:
            raise ValueError("test and test_split are two sources of held-out pairs: give one of them")
        return self


class SftStage(DataSource):
    """Supervised fine-tuning before DPO, with the same method and resources: its result is the base of the runs.

    Rows have `messages`, `prompt` and `completion`, or `text`, as TRL's SFTTrainer takes them, or are ShareGPT's
    `conversations` or Alpaca's `instruction`, `input` and `output`. Every further setting is a field of TRL's
    `SFTConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def recipe(self) -> dict[str, Any]:
        """Fields of SFTConfig."""
        return dict(self.model_extra or {})


class Resources(Config):
    """What one run takes, and no more: more runs than the cluster holds wait their turn."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each worker needs, by Ray's names."""
        bundle = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return [{name: amount for name, amount in bundle.items() if amount}] * self.workers


class TrainingConfig(Config):
    """`prefvec train --config FILE`: train each preference, by default in both polarities, and publish the vectors."""

    name: Name
    """Name of the run folder under `output`."""
    base: Path
    """Folder of the base (SFT) model in Hugging Face format, tokenizer included."""
    preferences: dict[Name, PreferenceData] = Field(min_length=1)
    output: Path = Path("runs")
    dpo: dict[str, Any] = {}
    """Any field of TRL's `DPOConfig`."""
    method: Literal["full", "lora"] = "full"
    """Train every parameter, or LoRA adapters; both give vectors over the same base."""
    lora: dict[str, Any] = {}
    """Any field of PEFT's `LoraConfig`: r, lora_alpha, target_modules …"""
    deepspeed: str | dict[str, Any] | None = None
    """zero1, zero2, zero3, zero2-offload, zero3-offload, a JSON file, or DeepSpeed's own settings; else DDP."""
    quantize: Quantization | None = None
    """Round the base's linear layers to nf4 (4 bits) or int8 while LoRA adapters are trained beside them (QLoRA); the
    vector still belongs to the base as it is."""
    fsdp: str | dict[str, Any] | None = None
    """fsdp2, fsdp2-offload, or fields of transformers' `fsdp_config`; else DDP."""
    sft: SftStage | None = None
    """Fine-tune the base on demonstrations first, and train the preferences from there."""
    global_batch_size: int | None = Field(default=None, gt=0)
    """Pairs per optimizer step over all workers: gradient accumulation follows from it, so that the number of workers
    changes the speed and not the result. If left out, a step takes `dpo`'s own batch on every worker."""
    seeds: list[int] = Field(default=[0], min_length=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    polarity: Literal["both", "positive"] = "both"
    """both: phi = theta+ - theta-, two runs a preference, as in the paper. positive: phi = theta+ - theta_base, one run
    and a vector about half as long; docs/methods.md has what is lost."""
    mixed: bool = False
    """Also train one DPO run a seed on an equal share of every preference's pairs: the baseline to beat."""
    chat_template: str | None = None
    """A Jinja chat template file, or `transcript`, for a base whose tokenizer brings none."""
    resources: Resources = Resources()
    watch: Watch = Watch()
    checkpoint_every: float | None = Field(default=0.25, gt=0)
    """Steps between two checkpoints of a run, or below 1 a share of its steps; null: none, a lost run starts over."""
    retries: int = Field(default=2, ge=0)
    """How often a run is started again, from its checkpoint, after a process or node of it was lost."""
    vector_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    registry: str | None = None
    """Folder or bucket of the vector registry; `<output>/<name>/registry` when left out."""

    @field_validator("preferences")
    @classmethod
    def _names(cls, preferences: dict[str, PreferenceData]) -> dict[str, PreferenceData]:
        for name in preferences:
            if name in (MIXED, KL):
                raise ValueError(f"{name!r} cannot name a preference, it has a meaning of its own; choose another")
        return preferences

    @field_validator("checkpoint_every")
    @classmethod
    def _whole_steps(cls, every: float | None) -> float | None:
        if every is not None and every >= 1 and every != int(every):
            raise ValueError(f"{every} steps: give a whole number, or a share of the run below 1")
        return every

    @field_validator("dpo", "sft")
    @classmethod
    def _free_fields(cls, given: Any, info: ValidationInfo) -> Any:
        recipe, owned = (given.recipe, SFT_OWNED) if isinstance(given, SftStage) else (given or {}, OWNED)
        for field in recipe:
            if field in owned:
                raise ValueError(f"{info.field_name}.{field} is set by the plan ({owned[field]}): remove it")
        return given

    @model_validator(mode="after")
    def _seeds(self) -> "TrainingConfig":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds contain one number twice")
        return self

    @property
    def run_method(self) -> Method:
        from prefvec_ray.training.fsdp import fsdp_config
        from prefvec_ray.training.zero import deepspeed_config

        deepspeed, fsdp = deepspeed_config(self.deepspeed), fsdp_config(self.fsdp)
        return Method(kind=self.method, lora=self.lora, deepspeed=deepspeed, fsdp=fsdp, quantize=self.quantize)

    @property
    def recipe(self) -> dict[str, Any]:
        """DPOConfig's fields for a run, gradient accumulation by `global_batch_size` included."""
        if self.global_batch_size is None:
            return self.dpo
        return {**self.dpo, "gradient_accumulation_steps": self.global_batch_size // self.pairs_at_once}

    @property
    def polarities(self) -> list[Polarity]:
        """Of each preference's runs, the positive one first."""
        return ["positive", "negative"] if self.polarity == "both" else ["positive"]

    @property
    def recipe_key(self) -> str:
        """All that a run's result depends on beside base, data, polarity and seed, as JSON."""
        pairs = self.pairs_at_once * int(self.recipe.get("gradient_accumulation_steps", 1))
        return json.dumps([self.dpo, self.run_method.key, pairs], sort_keys=True)

    @property
    def pairs_at_once(self) -> int:
        """Pairs in a forward pass of all workers together."""
        return int(self.dpo.get("per_device_train_batch_size", 8)) * self.resources.workers

    @property
    def folder(self) -> Path:
        return (self.output / self.name).absolute()

    @property
    def store(self) -> str:
        return self.registry or str(self.folder / "registry")

    def check(self) -> None:
        """Refuse what would fail later, before a cluster is joined.

        Raises:
            InputError: an unknown DPO field, a base that is no model folder, a chat template that is missing, a method
                that contradicts the recipe, the resources or what is installed.
        """
        check_lasting(output=self.output, registry=self.registry)
        self._check_method()
        from trl import DPOConfig, SFTConfig

        from prefvec_ray.preferences.templates import read_template

        check_fields("dpo", self.dpo, DPOConfig)
        check_loss(self.dpo)
        check_batches("dpo", self.dpo)
        if self.sft is not None:
            check_fields("sft", self.sft.recipe, SFTConfig)
            check_batches("sft", self.sft.recipe)
        if not (self.base / "config.json").is_file():
            raise InputError(f"base {self.base}: no config.json there; give the folder of a Hugging Face model")
        if self.chat_template is not None:
            read_template(self.chat_template)
        for tracker in self.watch.report_to:
            if not importlib.util.find_spec(tracker):
                raise InputError(f"watch.report_to names {tracker}, which is not installed here: pip install {tracker}")
        if not any(self.base.glob("*.safetensors")):
            raise InputError(f"base {self.base}: no *.safetensors there; convert the weights with save_pretrained")
        from prefvec_ray.vectors import Checkpoint

        Checkpoint(self.base)  # two models, an adapter beside the model, a damaged index

        if self.dpo.get("padding_free"):
            from prefvec_ray.training.head import check_padding_free

            check_padding_free(self.base, self.dpo)
        sharded = (self.deepspeed or self.fsdp) is not None
        if self.quantize is not None:
            from prefvec_ray.training.quantized import check_quantization

            check_quantization(self.quantize, self.base, self.method, sharded=sharded)
            if self.sft is not None:
                raise InputError("quantize: an SFT stage trains the base itself; run it as a training of its own first")
        if self.method == "lora":
            from prefvec_ray.training.lora import check_lora

            check_lora(self.base, self.lora, sharded=sharded)

    def _check_method(self) -> None:
        from prefvec_ray.training.fsdp import fsdp_config
        from prefvec_ray.training.zero import check_installed, deepspeed_config

        gpus, workers = self.resources.gpus_per_worker, self.resources.workers
        if self.lora and self.method != "lora":
            raise InputError("lora is set, but method is 'full': set method to 'lora', or remove lora")
        if gpus > 1:
            raise InputError(f"resources.gpus_per_worker is {gpus:g}: a worker drives one GPU; give more workers")
        if 0 < gpus < 1 and workers > 1:
            raise InputError("workers of one run cannot share a GPU (NCCL refuses it): give gpus_per_worker 1")
        if not gpus:
            for field, value in (("ddp_backend", "nccl"), ("fp16", True), ("use_cpu", False)):
                if self.dpo.get(field) == value:
                    raise InputError(
                        f"dpo.{field} is {value!r}, but resources.gpus_per_worker is 0: no worker has a GPU"
                    )
        if self.dpo.get("fp16") and self.dpo.get("bf16"):
            raise InputError("dpo: bf16 and fp16 are both on; choose one")
        if "dtype" in (self.dpo.get("model_init_kwargs") or {}):
            raise InputError("dpo.model_init_kwargs: dtype is decided here (fp32 master weights); set dpo.bf16 instead")
        if self.deepspeed is not None:
            deepspeed_config(self.deepspeed)
            check_installed()
        if self.fsdp is not None:
            fsdp_config(self.fsdp)
            if self.deepspeed is not None:
                raise InputError("fsdp and deepspeed are both set, and each spreads a run over its workers: remove one")
            if workers == 1:
                raise InputError(
                    "fsdp spreads a run over its workers, and resources.workers is 1: give more, or remove it"
                )
        if self.global_batch_size is not None:
            if "gradient_accumulation_steps" in self.dpo:
                raise InputError("dpo.gradient_accumulation_steps follows from global_batch_size: remove one of them")
            if self.global_batch_size % self.pairs_at_once:
                raise InputError(
                    f"global_batch_size {self.global_batch_size} is no multiple of the {self.pairs_at_once} pairs that "
                    f"{workers} worker(s) take at once (dpo.per_device_train_batch_size x resources.workers)"
                )

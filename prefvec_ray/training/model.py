"""The model that a run trains: fp32 master weights, whatever the base is stored in and whatever it is computed in."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.chat import end_tokens
from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.training.fsdp import leave_fsdp, start_fsdp
from prefvec_ray.training.quantized import quantized_loading
from prefvec_ray.training.zero import leave_deepspeed, start_deepspeed

if TYPE_CHECKING:
    from trl import DPOConfig, SFTConfig


A = TypeVar("A", bound=TrainingArguments)


def arguments(kind: type[A], recipe: dict[str, Any], output_dir: str | Path, **owned: Any) -> A:
    """The user's recipe over defaults that hold on CPU and GPU alike, with what the plan owns on top.

    With `deepspeed` or `fsdp` among what it owns, that is started: it decides how models are loaded from here on.
    """
    leave_deepspeed()
    leave_fsdp()
    if owned.get("deepspeed"):
        start_deepspeed()
    elif owned.get("fsdp"):
        start_fsdp()
    gpu = best_device().type == "cuda"
    defaults: dict[str, Any] = {
        "bf16": gpu and torch.cuda.is_bf16_supported() and not recipe.get("fp16"),
        "activation_checkpointing": False,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 0.05,
        "save_strategy": "no",
    }
    fixed = {"output_dir": str(output_dir), "logging_nan_inf_filter": False}
    return kind(**{**defaults, **recipe, **fixed, **owned})


def load_base(base: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The base model; in fp32 by default, since phi must not be rounded as it forms."""
    options.setdefault("use_safetensors", True)
    return from_pretrained(AutoModelForCausalLM, base, dtype=dtype, **options)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    tokenizer = from_pretrained(AutoTokenizer, base)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError(f"base {base}: its tokenizer has neither an end nor a pad token; set eos_token in its files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_ends(base: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end an answer of this base: its generation config's and its tokenizer's."""
    return end_tokens(generation_config(base), tokenizer)


def generation_config(base: str | Path) -> GenerationConfig | None:
    """The base's own; None where it has none."""
    return from_pretrained(GenerationConfig, base) if (Path(base) / "generation_config.json").is_file() else None


def load_model(base: str | Path, method: Method, args: "DPOConfig | SFTConfig") -> PreTrainedModel:
    """What a run starts from, and what its reference log-probs come from: the same numbers in both.

    Under LoRA a base that is stored in bf16 stays so if the run computes in bf16: frozen, it loses nothing. `args` must
    exist before: it tells transformers that ZeRO-3 wants the model in pieces.
    """
    options, args.model_init_kwargs = (
        dict(args.model_init_kwargs or {}),
        None,
    )  # so that TRL does not warn that it is ignored
    stored = getattr(from_pretrained(AutoConfig, base, trust_remote_code=args.trust_remote_code), "dtype", None)
    frozen = method.kind == "lora" and method.deepspeed is None and args.bf16 and stored == torch.bfloat16
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if frozen else torch.float32}
    if method.quantize is not None:
        loading = quantized_loading(method.quantize, compute_dtype(args))
    return load_base(base, **{"trust_remote_code": args.trust_remote_code, **loading, **options})


def compute_dtype(args: "DPOConfig | SFTConfig") -> torch.dtype:
    """What forward and backward passes compute in. DeepSpeed rounds the model to it before it copies the fp32 master
    weights from it, so that a full run starts there and not at the base itself; under DDP it is autocast's alone.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32

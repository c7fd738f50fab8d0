"""The model that a run trains: fp32 master weights, whatever the base is stored in and whatever it is computed in."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.training.config import Method

if TYPE_CHECKING:
    from trl import DPOConfig, SFTConfig


def load_base(base: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The base model; in fp32 unless told otherwise, since phi must not be rounded as it forms."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(base: str | Path, method: Method, args: "DPOConfig | SFTConfig") -> PreTrainedModel:
    """What a run starts from, and what its reference log-probs come from: the same numbers in both.

    Under LoRA a base that is stored in bf16 stays so if the run computes in bf16: frozen, it loses nothing. `args` must
    exist before: it tells transformers that ZeRO-3 wants the model in pieces.
    """
    options, args.model_init_kwargs = dict(args.model_init_kwargs or {}), None  # so that TRL does not call it ignored
    stored = getattr(AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code), "dtype", None)
    frozen = method.kind == "lora" and method.deepspeed is None and args.bf16 and stored == torch.bfloat16
    dtype = torch.bfloat16 if frozen else torch.float32
    return load_base(base, dtype=dtype, **{"trust_remote_code": args.trust_remote_code, **options})


def compute_dtype(args: "DPOConfig | SFTConfig") -> torch.dtype:
    """What forward and backward passes compute in. DeepSpeed rounds the model to it before it copies the fp32 master
    weights from it, so that a full run starts there and not at the base itself; under DDP it is autocast's alone.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32

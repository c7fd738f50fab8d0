"""LoRA runs (arXiv 2106.09685) through PEFT: what of it can become an exact vector, checked before training."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.errors import InputError
from prefvec_ray.training.recipe import check_names

if TYPE_CHECKING:
    from peft import LoraConfig

DEFAULTS: dict[str, Any] = {"target_modules": "all-linear"}
"""PEFT's own defaults otherwise. Every linear layer but the head: what full training changes most."""


def lora_config(fields: Mapping[str, Any]) -> "LoraConfig":
    """PEFT's LoraConfig of the config's `lora:` section.

    Raises:
        InputError: a field that PEFT does not know, or a value that it refuses.
    """
    from peft import LoraConfig

    check_names("lora", fields, LoraConfig, "PEFT")
    try:
        return LoraConfig(**{**DEFAULTS, **fields, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: PEFT's LoraConfig refuses it: {' '.join(str(error).split())}") from error


def adapter_config(method: Method) -> "LoraConfig | None":
    """The adapter that a run of this method trains; None where it trains the model itself."""
    return lora_config(method.lora) if method.kind == "lora" else None


def check_lora(base: Path, fields: Mapping[str, Any], *, sharded: bool) -> None:
    """Build the adapter over the base without memory, and refuse what could not be trained or kept exactly.

    Raises:
        InputError: options that are not plain LoRA, modules that the base does not have, an adapter on the head or on
            tied embeddings, whole parameters trained under DeepSpeed or FSDP.
    """
    from prefvec_ray.vectors.adapters import check_adapter_config, skeleton

    config = lora_config(fields)
    check_adapter_config(config)
    whole = [f"modules_to_save {config.modules_to_save}"] if config.modules_to_save else []
    whole += [f"bias {config.bias!r}"] if config.bias != "none" else []
    if whole and sharded:
        raise InputError(
            f"lora: {whole[0]} trains whole parameters, which is not supported with deepspeed or fsdp; leave it out"
        )
    try:
        model, layout, _ = skeleton(base, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"lora: PEFT refuses it on base {base}: {' '.join(str(error).split())[:300]}") from error
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        live = _live(name)
        if ".lora_" in name and live == "lm_head":
            raise InputError(
                "lora: TRL computes with the head's own weight and would not train an adapter there; remove it"
            )
        if f"{live}.weight" not in layout and live not in layout and f"{live}.bias" not in layout:
            raise InputError(f"lora: {live} is tied to another parameter or unknown to the base; leave it out")


def _live(name: str) -> str:
    """`base_model.model.a.b.lora_A.default.weight` -> `a.b`; `….a.b.modules_to_save.default.weight` -> `a.b.weight`."""
    name = name.removeprefix("base_model.model.")
    if ".lora_" in name:
        return name.split(".lora_")[0].replace(".base_layer", "")
    return name.replace(".modules_to_save.default", "").replace(".base_layer", "")

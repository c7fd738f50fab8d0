"""QLoRA (arXiv 2305.14314): adapters beside a base whose linear layers are rounded to 4 or 8 bits, by bitsandbytes.

The vector belongs to the base in full precision: only the adapters are kept, and the base's files are what they were.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefvec_ray.artifacts.training import Quantization
from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError

BLOCK = 64
"""Numbers of a row that share a scale in nf4."""
BITS: dict[Quantization, float] = {"nf4": 4 + 8 / BLOCK, "int8": 8}
"""Of a number in a linear layer; nf4 keeps a scale of 8 bits for every 64 numbers (double quantization)."""


def check_quantization(kind: Quantization, base: Path, method: str, *, sharded: bool) -> None:
    """InputError where this base cannot be quantized so for such runs, or not here."""
    if method != "lora":
        raise InputError(f"quantize needs method lora, and method is {method!r}: quantized weights cannot be trained")
    if sharded:
        raise InputError("quantize is not supported with deepspeed or fsdp: leave one of them out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed: pip install 'prefvec-ray[qlora]', or leave `quantize` out")
    if kind == "nf4":
        for name, width in _widths(base).items():
            if width % BLOCK:
                raise InputError(
                    f"quantize: nf4 rounds blocks of {BLOCK} numbers, and rows of {name} in base {base} have {width}: "
                    "use int8"
                )


def _widths(base: Path) -> dict[str, int]:
    """Numbers of a row of each linear layer but the head, by the layer's name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefvec_ray.common.pretrained import from_pretrained

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, base))
    layers = linear_layers(model)
    return {n: layer.in_features if isinstance(layer, torch.nn.Linear) else layer.nx for n, layer in layers.items()}


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear | Conv1D]:
    """The layers that bitsandbytes rounds, by name: all linear ones but the head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def quantized_loading(kind: Quantization, compute: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` for a base that is rounded as it is loaded, onto this process's device.

    Args:
        compute: the dtype of activations. Layers that are not rounded (norms, embeddings, the head) are loaded in it.
    """
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        rounding = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    else:
        rounding = BitsAndBytesConfig(load_in_8bit=True)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast, in every layer of every step
    return {"quantization_config": rounding, "device_map": {"": best_device()}, "dtype": compute}

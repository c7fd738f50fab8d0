"""DeepSpeed ZeRO (arXiv 1910.02054) for runs whose optimizer, gradients or parameters do not fit on one device.

`deepspeed: zero2` in a config names a preset here; a mapping or a JSON file is DeepSpeed's own config. DeepSpeed is
imported only by the workers that use it.
"""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_json

# Left to the recipe (`dpo:`), which then cannot contradict it.
FROM_RECIPE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
# Bucket sizes that follow the model's width; DeepSpeed's own are made for very large models.
_SHARDED = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
_ON_CPU = {"device": "cpu", "pin_memory": True}
# torch's AdamW steps on the CPU as it is; DeepSpeed's own would have to be compiled on every node first.
_TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}

PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": _SHARDED},
    "zero2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": _ON_CPU}, **_TORCH_ADAM},
    "zero3-offload": {
        "zero_optimization": {**_SHARDED, "offload_optimizer": _ON_CPU, "offload_param": _ON_CPU},
        **_TORCH_ADAM,
    },
}
"""zero1: each worker keeps its share of the optimizer's state; zero2: of the gradients too; zero3: of the parameters
too; -offload: its share lies in the node's memory instead of the device's."""


def deepspeed_config(setting: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The DeepSpeed config that a preset's name, a JSON file or a mapping stands for; None for plain DDP.

    Raises:
        InputError: neither a preset nor a readable file, or a setting that would make phi wrong or that contradicts
            the recipe.
    """
    if setting is None:
        return None
    if isinstance(setting, str):
        given, source = PRESETS.get(setting) or _read(setting), f"deepspeed {setting}"
    else:
        given, source = dict(setting), "deepspeed"
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping) or zero.get("stage") not in (1, 2, 3):
        raise InputError(f"{source}: zero_optimization.stage must be 1, 2 or 3; leave `deepspeed` out for plain DDP")
    for field, auto in FROM_RECIPE.items():
        value = given.get(field, auto)
        if isinstance(auto, dict):
            if not isinstance(value, Mapping):
                raise InputError(f"{source}: {field} is {value!r:.60}; expected a section of settings")
            masters = [key for key, on in value.items() if key.endswith("master_weights_and_grads") and on]
            if masters:
                raise InputError(f"{source}: {field}.{masters[0]} keeps no fp32 master weights, and phi needs them")
            field, value = f"{field}.enabled", value.get("enabled", "auto")
        if value != "auto":
            raise InputError(
                f"{source}: {field} is {value!r}, but the recipe decides it; give 'auto' and set it in dpo"
            )
    parallel = given.get("tensor_parallel") or {}
    if not isinstance(parallel, Mapping) or parallel.get("autotp_size", 1) not in (0, 1):
        raise InputError(f"{source}: tensor_parallel cuts parameters in a way that phi cannot be gathered from")
    if given.get("sequence_parallel_size", 1) != 1:
        raise InputError(
            f"{source}: sequence_parallel_size cuts conversations, which is not supported: leave it out, and set "
            "dpo.activation_checkpointing for long ones"
        )
    return {**FROM_RECIPE, **given}


def _read(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        known = ", ".join(PRESETS)
        raise InputError(f"deepspeed {file!r}: neither a preset ({known}) nor a JSON file of DeepSpeed's settings")
    return read_json(file, "give a JSON object of DeepSpeed's settings")


def check_installed() -> None:
    """InputError with what to install where DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("deepspeed is not installed: pip install 'prefvec-ray[deepspeed]', or leave `deepspeed` out")


def start_deepspeed() -> None:
    """Give DeepSpeed its process group; before the model is loaded, since ZeRO-3 cuts it up while it loads.

    Takes the group that Ray Train made, or makes one of this process alone. On CPUs gloo carries everything:
    DeepSpeed's own shared-memory operation would first have to be compiled on every node, for 40 seconds.
    """
    import torch.distributed as dist

    gpu = best_device().type == "cuda"
    import deepspeed

    # A line from torch for each collective that DeepSpeed calls by its old name, in every step of every worker.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    if dist.get_world_size() == 1:
        # Accelerate and DeepSpeed read from the environment what torch has set already.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def leave_deepspeed() -> None:
    """Forget an earlier run of this process: it would have models loaded in pieces, and DDP runs turned into ZeRO-2."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)

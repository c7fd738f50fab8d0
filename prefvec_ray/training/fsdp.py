"""PyTorch's fully sharded data parallel, version 2 (FSDP2), for runs whose parameters do not fit on one device.

`fsdp: fsdp2` in a config names a preset here; a mapping has fields of transformers' `fsdp_config`. Each worker keeps
its share of the fp32 master weights, gradients and optimizer; layers are gathered for the moment of their use.
"""

import os
from collections.abc import Mapping
from typing import Any

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {"fsdp2": {}, "fsdp2-offload": {"cpu_offload": True}}
"""fsdp2: as ZeRO-3; fsdp2-offload: a worker's share lies in the node's memory instead of the device's."""
FIELDS: dict[str, str] = {
    "cpu_offload": "a worker's share lies in the node's memory",
    "reshard_after_forward": "false: layers stay gathered between forward and backward pass",
    "transformer_layer_cls_to_wrap": "what is gathered at a time, if not the model's own layers",
}
# One process a node reads the base, and only shares are written to checkpoints.
_ALWAYS = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
_ENVIRONMENT = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


def fsdp_config(setting: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """transformers' `fsdp_config` that a preset's name or a mapping stands for; None: no FSDP.

    Raises:
        InputError: another name, or a field that is not one of FIELDS.
    """
    if setting is None:
        return None
    if isinstance(setting, str):
        if setting not in PRESETS:
            raise InputError(f"fsdp {setting!r} is no preset: give one of {', '.join(PRESETS)}, or a mapping")
        return _ALWAYS | PRESETS[setting]
    for field in setting:
        if field == "activation_checkpointing":
            raise InputError("fsdp.activation_checkpointing: set dpo.activation_checkpointing, which every method has")
        if field not in FIELDS:
            raise InputError(f"fsdp.{field} is decided here, or no field of fsdp_config; known: {', '.join(FIELDS)}")
    return _ALWAYS | dict(setting)


def sharding(method: Method) -> dict[str, Any]:
    """The trainer's arguments by which DeepSpeed or FSDP spreads a run of this method over its workers."""
    # transformers adds to the mapping that it is given
    return {"deepspeed": method.deepspeed} if method.fsdp is None else {"fsdp": True, "fsdp_config": {**method.fsdp}}


def process_group(method: Method, *, gpus: bool) -> str:
    """The backend of a run's process group, by torch's names. What FSDP has offloaded is summed up on the CPU, where
    NCCL cannot."""
    if not gpus:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if method.fsdp and method.fsdp.get("cpu_offload") else "nccl"


def start_fsdp() -> None:
    """From here on, models are loaded by one process a node; the others get theirs when the trainer shards them."""
    os.environ.update(dict.fromkeys(_ENVIRONMENT, "true"))


def leave_fsdp() -> None:
    """Forget an earlier run of this process, which would shard the next one as well."""
    for name in _ENVIRONMENT:
        os.environ.pop(name, None)


class FSDPOnCPUs:
    """For a Trainer: FSDP over CPU workers too, where accelerate quietly trains with DDP instead."""

    def create_accelerator_and_postprocess(self: Any) -> None:
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import CPUOffloadPolicy

        super().create_accelerator_and_postprocess()  # type: ignore[misc]  # of the Trainer beside it
        if not self.args.fsdp or self.is_fsdp_enabled:
            return
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.args.fsdp_plugin_args.get("cpu_offload"):
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which takes a GPU
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        AcceleratorState._shared_state.update(fsdp_plugin=plugin, distributed_type=DistributedType.FSDP)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

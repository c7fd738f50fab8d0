"""What a run changed, from its fp32 master weights: never from a checkpoint that was rounded.

Under DDP the model's own parameters are the masters (bf16 is autocast). Under DeepSpeed and FSDP they lie in pieces on
the workers and are gathered one parameter at a time. Memory: every worker holds one parameter in fp32 on its device at
a time, and of the change no more than a shard of a gigabyte in host memory; it reads the base from memory-mapped files.
"""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.training.model import compute_dtype
from prefvec_ray.training.watch import RunStoppedError
from prefvec_ray.training.zero import leave_deepspeed
from prefvec_ray.vectors import (
    Checkpoint,
    Entry,
    Full,
    LowRank,
    PreferenceVector,
    VectorInfo,
    save_vector,
    vector_from_adapter,
)
from prefvec_ray.vectors.checkpoint import TensorPiece, check_names, checkpoint_layout
from prefvec_ray.vectors.part_writer import PartWriter, write_index
from prefvec_ray.vectors.precision import StorageLoss

if TYPE_CHECKING:
    from transformers import Trainer

T = TypeVar("T")
Layout = dict[str, list[TensorPiece]]
SAMPLE = 1 << 22
FP32: dict[str, JsonValue] = {"masters": "float32"}


def parameter_layout(base: str | Path) -> Layout:
    """Live parameter name -> the checkpoint's tensors in it. Call it before DeepSpeed takes over model loading.

    Raises:
        InputError: a parameter that the base's files do not hold.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    leave_deepspeed()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, base))
        check_names(model, base)
        return checkpoint_layout(model)


def master_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Live name and value of every trained parameter, whole and in fp32, one after the other; tied ones once.

    Every rank iterates, to the end: under DeepSpeed each value comes from all of them.

    Raises:
        RunStoppedError: on all ranks, at the end, if a parameter is not finite.
    """
    broken = None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what the last forward pass has left gathered is rounded to what it computes in
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            whole = cast(DTensor, parameter.to(parameter.device_mesh.device_type)).full_tensor()
            value = whole.detach().float()
        elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
        else:
            value = parameter.detach().float()
        if broken is None and not torch.isfinite(value).all():
            broken = name
        yield name, value
    if broken is not None:
        raise RunStoppedError(f"parameter {broken} is not finite after training: lower learning_rate")


def trained_numbers(model: nn.Module) -> int:
    """How many numbers a run trains, whole, wherever they lie."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def write_delta(
    trainer: "Trainer", method: Method, layout: Layout, base: str | Path, folder: Path, **labels: Any
) -> dict[str, JsonValue]:
    """Write a trained run's delta as a vector in fp32, into `folder/delta`. Every rank calls this.

    A full run gives full entries, and every rank writes its part of them. A LoRA run gives low-rank ones, exact; rank 0
    writes them, and before that the adapter as PEFT's own folder, in fp32, to `folder/adapter`.

    Args:
        layout: `parameter_layout(base)`, from before training.
        folder: the same one on storage that all ranks see.
        labels: the other arguments of `vector_from_state`.

    Returns:
        The delta's `info.precision`, on every rank the same: what bf16 checkpoints would have kept of it.

    Raises:
        RunStoppedError: on all ranks, if a parameter is not finite.
    """
    if method.kind == "full":
        start = compute_dtype(trainer.args) if method.deepspeed else torch.float32
        return _write_parts(trainer.model, layout, base, start, folder / "delta", labels)
    main = trainer.is_world_process_zero()
    state = {name: value.cpu() for name, value in master_weights(trainer.model) if main}
    if not main:
        return {}
    trainer.model.save_pretrained(folder / "adapter", state_dict=state, save_embedding_layers=False)
    leave_deepspeed()  # PEFT's skeleton of the adapter is built here alone, and whole
    labels.pop("base_fingerprint")
    vector = vector_from_adapter(folder / "adapter", base=base, **labels)
    kept = bf16_checkpoints_keep(base, vector)
    vector = vector.replace(precision=vector.info.precision | FP32 | {"in_bf16_checkpoints": kept})
    save_vector(vector, folder / "delta")
    return vector.info.precision


def _write_parts(
    model: nn.Module, layout: Layout, base: str | Path, start: torch.dtype, folder: Path, labels: dict[str, Any]
) -> dict[str, JsonValue]:
    """theta_run - theta_start of all parameters under the checkpoint's names; what did not change is left out.

    The parameters are dealt to the ranks by their size. Each is gathered for a moment; its rank keeps the change until
    a shard is full.

    Args:
        start: the dtype that the base was rounded to when the master weights were made from it (`compute_dtype` under
            DeepSpeed, else fp32).
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    pristine, kept, dealt = Checkpoint(base), BF16Loss(), [0] * ranks
    part = PartWriter(folder, rank, VectorInfo(form="full", dtype="float32", **labels))
    for live, value in master_weights(model):
        owner = dealt.index(min(dealt))
        dealt[owner] += value.numel()
        for piece in layout[live] if owner == rank else []:
            trained = value.contiguous().as_strided(piece.shape, piece.stride, piece.offset).cpu()
            origin = pristine[piece.name]
            change = trained - origin.to(start).float()
            if change.any():
                kept.update(origin, Full(change))
                part.add(piece.name, change.contiguous())
    whole = sum(_of_all(kept, ranks), BF16Loss())
    precision = StorageLoss().report() | FP32 | {"in_bf16_checkpoints": whole.report()}
    parts = _of_all(part.finish(precision), ranks)
    if rank == 0:
        write_index(folder, parts)
    return precision


def _of_all(mine: T, ranks: int) -> list[T]:
    """What every rank gives, in their order."""
    if ranks == 1:
        return [mine]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, mine)
    return gathered


@dataclass
class BF16Loss:
    """What would be left of phi = theta+ - theta- had both runs been saved in bf16, summed over parameters."""

    dot: float = 0.0
    error: float = 0.0
    energy: float = 0.0
    coarse_energy: float = 0.0
    changed: int = 0
    lost: int = 0

    def update(self, origin: Tensor, positive: Entry | None, negative: Entry | None = None) -> None:
        """One parameter: the base's, and what the runs changed, None being nothing."""
        step = math.ceil(origin.numel() / SAMPLE) if origin.dim() else 1
        base_rows = (origin[::step] if origin.dim() else origin).float()
        plus, minus = _rows(positive, step), _rows(negative, step)
        phi = plus - minus
        coarse = (base_rows + plus).bfloat16().float() - (base_rows + minus).bfloat16().float()
        self.dot += (phi * coarse).sum(dtype=torch.float64).item()
        self.error += (phi - coarse).square().sum(dtype=torch.float64).item()
        self.energy += phi.square().sum(dtype=torch.float64).item()
        self.coarse_energy += coarse.square().sum(dtype=torch.float64).item()
        self.changed += int((phi != 0).sum())
        self.lost += int(((phi != 0) & (coarse == 0)).sum())

    def __add__(self, other: "BF16Loss") -> "BF16Loss":
        return BF16Loss(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def report(self) -> dict[str, JsonValue]:
        """{"cosine" with the true phi, "relative_error" |bf16 phi - phi| / |phi|, "lost": share of changed numbers that
        come out as exactly 0}."""
        return {
            "cosine": self.dot / math.sqrt(self.energy * self.coarse_energy) if self.coarse_energy else 0.0,
            "relative_error": math.sqrt(self.error / self.energy) if self.energy else 0.0,
            "lost": self.lost / self.changed if self.changed else 0.0,
        }


def bf16_checkpoints_keep(
    base: str | Path, positive: PreferenceVector, negative: PreferenceVector | None = None
) -> dict[str, JsonValue]:
    """`BF16Loss.report` of phi = theta+ - theta-; `negative` left out is the base.

    Over all numbers, or over a spread of rows where a parameter has more than 4 million.
    """
    pristine, loss = Checkpoint(base), BF16Loss()
    for name in sorted({*positive.names(), *(negative.names() if negative else [])}):
        plus, minus = (run.entry(name) if run and name in run else None for run in (positive, negative))
        loss.update(pristine[name], plus, minus)
    return loss.report()


def _rows(entry: Entry | None, step: int) -> Tensor:
    """Every `step`-th row of phi of one parameter, dense in fp32; 0 where it is left alone."""
    if entry is None:
        return torch.zeros(())
    if isinstance(entry, LowRank) and entry.A_RI.dim() == 2:
        return LowRank(entry.A_RI, entry.B_OR[::step]).dense()
    dense = entry.dense()
    return dense[::step] if dense.dim() else dense

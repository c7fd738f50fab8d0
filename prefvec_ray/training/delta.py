"""What a run changed, from its fp32 master weights: never from a checkpoint that was rounded.

Under DDP the model's own parameters are the masters (bf16 is autocast). Under DeepSpeed they lie in pieces on the
workers and are gathered one parameter at a time with DeepSpeed's own call. Memory: every worker holds one parameter in
fp32 on its device at a time; rank 0 collects the change, 4 bytes a trained parameter, in host memory, and reads the
base from its memory-mapped files.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.training.model import compute_dtype
from prefvec_ray.training.watch import RunStoppedError
from prefvec_ray.training.zero import leave_deepspeed
from prefvec_ray.vectors import Checkpoint, LowRank, PreferenceVector, vector_from_adapter, vector_from_state
from prefvec_ray.vectors.checkpoint import TensorPiece, check_names, checkpoint_layout

if TYPE_CHECKING:
    from transformers import Trainer

Layout = dict[str, list[TensorPiece]]
SAMPLE = 1 << 22


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
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
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


def full_delta(
    model: nn.Module, layout: Layout, base: str | Path, *, start: torch.dtype, keep: bool
) -> dict[str, Tensor]:
    """theta_run - theta_start in fp32 on the CPU, under the checkpoint's names; what did not change is left out.

    Args:
        start: the dtype that the base was rounded to when the master weights were made from it (`compute_dtype` under
            DeepSpeed, else fp32).
        keep: False on ranks that only help to gather; they get an empty dict.
    """
    pristine = Checkpoint(base)
    delta: dict[str, Tensor] = {}
    for live, value in master_weights(model):
        for piece in layout[live] if keep else []:
            trained = value.contiguous().as_strided(piece.shape, piece.stride, piece.offset).cpu()
            change = trained - pristine[piece.name].to(start).float()
            if change.any():
                delta[piece.name] = change
    return delta


def run_vector(
    trainer: "Trainer", method: Method, layout: Layout, base: str | Path, adapter: Path, **labels: Any
) -> PreferenceVector | None:
    """A trained run's delta as a vector in fp32, on rank 0; the others help to gather it and get None.

    A full run gives full entries. A LoRA run gives low-rank ones, exact; its adapter is written to `adapter` first, as
    PEFT's own folder, in fp32. `info.precision` has what bf16 checkpoints would have kept of it.

    Args:
        layout: `parameter_layout(base)`, from before training.
        labels: the other arguments of `vector_from_state`.
    """
    main = trainer.is_world_process_zero()
    if method.kind == "full":
        start = compute_dtype(trainer.args) if method.deepspeed else torch.float32
        delta = full_delta(trainer.model, layout, base, start=start, keep=main)
        vector = vector_from_state(delta, **labels) if main else None
    else:
        state = {name: value.cpu() for name, value in master_weights(trainer.model) if main}
        if main:
            trainer.model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
            leave_deepspeed()  # PEFT's skeleton of the adapter is built here alone, and whole
            labels.pop("base_fingerprint")
        vector = vector_from_adapter(adapter, base=base, **labels) if main else None
    if vector is None:
        return None
    kept = {"masters": "float32", "in_bf16_checkpoints": bf16_checkpoints_keep(base, vector)}
    return vector.replace(precision=vector.info.precision | kept)


def bf16_checkpoints_keep(
    base: str | Path, positive: PreferenceVector, negative: PreferenceVector | None = None
) -> dict[str, float]:
    """What would be left of phi = theta+ - theta- had both runs been saved in bf16; `negative` left out is the base.

    Returns:
        {"cosine" with the true phi, "relative_error" |bf16 phi - phi| / |phi|, "lost": share of changed numbers that
        come out as exactly 0}, over all numbers, or over a spread of rows where a parameter has more than 4 million.
    """
    pristine = Checkpoint(base)
    dot = error = energy = coarse_energy = 0.0
    changed = lost = 0
    for name in sorted({*positive.names(), *(negative.names() if negative else [])}):
        origin = pristine[name]
        step = math.ceil(origin.numel() / SAMPLE) if origin.dim() else 1
        base_rows = (origin[::step] if origin.dim() else origin).float()
        plus, minus = _rows(positive, name, step), _rows(negative, name, step)
        phi = plus - minus
        coarse = (base_rows + plus).bfloat16().float() - (base_rows + minus).bfloat16().float()
        dot += (phi * coarse).sum(dtype=torch.float64).item()
        error += (phi - coarse).square().sum(dtype=torch.float64).item()
        energy += phi.square().sum(dtype=torch.float64).item()
        coarse_energy += coarse.square().sum(dtype=torch.float64).item()
        changed += int((phi != 0).sum())
        lost += int(((phi != 0) & (coarse == 0)).sum())
    return {
        "cosine": dot / math.sqrt(energy * coarse_energy) if coarse_energy else 0.0,
        "relative_error": math.sqrt(error / energy) if energy else 0.0,
        "lost": lost / changed if changed else 0.0,
    }


def _rows(vector: PreferenceVector | None, name: str, step: int) -> Tensor:
    """Every `step`-th row of phi of one parameter, dense in fp32; 0 where the vector leaves it alone."""
    if vector is None or name not in vector:
        return torch.zeros(())
    entry = vector.entry(name)
    if isinstance(entry, LowRank) and entry.A_RI.dim() == 2:
        return LowRank(entry.A_RI, entry.B_OR[::step]).dense()
    dense = entry.dense()
    return dense[::step] if dense.dim() else dense

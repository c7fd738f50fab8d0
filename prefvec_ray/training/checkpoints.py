"""Checkpoints of a run that is under way, and errors of a full disk.

They are transformers' own checkpoint folders (weights, optimizer, scheduler, random state, or DeepSpeed's shards). They
lie on the storage that all nodes share, beside the run's folder: `.<run>.checkpoints/checkpoint-<step>`. A checkpoint
is whole when it holds `complete.json`, which is written last and lists every file with its size. A torn one is never
resumed. The newest whole one is kept until the next is whole, and all are removed when the run ends.
"""

import errno
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from transformers import Trainer, TrainerCallback

from prefvec_ray.common.atomic import new_folder, write_whole
from prefvec_ray.common.errors import InputError, JobError

COMPLETE = "complete.json"
FULL = (
    "No space left on device",  # safetensors, Arrow
    "PytorchStreamWriter failed writing",  # torch.save, by how far it got
    "iostream error",
    "unexpected pos",
)


class DiskFullError(JobError):
    """A folder of the run has no space left; nothing half-written is kept."""


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint as whole once every rank has written its part, then removes the older ones."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
            workers = None if args.fsdp else args.world_size
            marker = {"step": state.global_step, "workers": workers, "files": files}
            write_whole(folder / COMPLETE, json.dumps(marker))
            _remove(folder.parent, keep=folder)
        _barrier()


def checkpoint_folder(out: str | Path) -> Path:
    """Where the run that will appear at `out` keeps its checkpoints."""
    return Path(out).with_name(f".{Path(out).name}.checkpoints")


def newest_checkpoint(folder: Path, workers: int) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its step; None where there is none that `workers` processes can continue from.

    Under FSDP any number of them can. Otherwise a run with another number of workers starts over: DeepSpeed's shards do
    not fit, and a step may see other pairs.
    """
    whole = []
    for marker in folder.glob(f"checkpoint-*/{COMPLETE}"):
        content = json.loads(marker.read_text())
        paths = {marker.parent / file: size for file, size in content["files"].items()}
        intact = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
        if intact and content["workers"] in (workers, None):
            whole.append((int(content["step"]), marker.parent))
    return max(whole)[::-1] if whole else None


def saving(every: float | None) -> dict[str, Any]:
    """The trainer's arguments for a checkpoint every so many steps, or below 1 every such share of a run."""
    return {"save_strategy": "steps", "save_steps": every if every < 1 else int(every)} if every else {}


def keep_checkpoints(trainer: Trainer, every: float | None) -> tuple[str | None, int | None]:
    """Let a run of `saving(every)` keep whole checkpoints. Returns the one to continue from and its step, if any.

    All ranks take what rank 0 sees: on a shared file system another one might see a little less.
    """
    if not every:
        return None, None
    trainer.add_callback(CompleteCheckpoints())
    found = [newest_checkpoint(Path(trainer.args.output_dir), trainer.args.world_size)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return (str(found[0][0]), found[0][1]) if found[0] else (None, None)


def remove_checkpoints(out: str | Path) -> None:
    """Remove all checkpoints of a run that has finished, or was stopped for a reason that they would only repeat."""
    shutil.rmtree(checkpoint_folder(out), ignore_errors=True)


@contextmanager
def shared_folder(out: Path) -> Iterator[Path]:
    """`new_folder(out)` of rank 0, for all ranks to write into. It appears when all of them have left the block."""
    if not (dist.is_available() and dist.is_initialized()):
        with new_folder(out) as folder:
            yield folder
        return
    with new_folder(out) if dist.get_rank() == 0 else nullcontext() as folder:
        made = [str(folder)]
        dist.broadcast_object_list(made, src=0)
        yield Path(made[0])
        _barrier()


@contextmanager
def named_when_full(folder: Path, advice: str = "free some") -> Iterator[None]:
    """Around writing: whatever a library raises for a full disk becomes a DiskFullError that names `folder`."""
    try:
        yield
    except Exception as error:
        if not _disk_full(error):
            raise
        free = gigabytes(shutil.disk_usage(folder).free)
        raise DiskFullError(
            f"no space left in {folder}: {free} free; {advice}, and start the same command again"
        ) from error


@contextmanager
def run_on_disk(out: str | Path, needed: int) -> Iterator[None]:
    """Around a run that will appear at `out`: when the disk is full, its torn checkpoint is removed, so that other
    runs can continue.

    Args:
        needed: bytes that the run writes, at most.
    """
    advice = f"a run takes up to {gigabytes(needed)}: free some, or set checkpoint_every: null"
    try:
        with named_when_full(Path(out).parent, advice):
            yield
    except DiskFullError:
        for checkpoint in checkpoint_folder(out).glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def check_space(folder: Path, base: Path, *, runs: int, at_once: int, vectors: int, checkpoints: bool) -> None:
    """Refuse a job that would fill the disk, before it starts, by what full-parameter runs write at most.

    A run leaves its delta (4 bytes a parameter of the base); while it trains, for a moment, two checkpoints (12 bytes
    each: weights and both moments of Adam). A vector is written beside the runs and into the registry (2 bytes each).

    Raises:
        InputError: `folder` has less space than that.
    """
    parameters = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    kept = (4 * runs + 4 * vectors) * parameters
    passing = 24 * min(runs, at_once) * parameters if checkpoints else 0
    free = shutil.disk_usage(folder).free
    if kept + passing > free:
        advice = "set checkpoint_every: null, " if kept < free else ""
        raise InputError(
            f"{folder} has {gigabytes(free)} free; {runs} runs of {parameters:,} parameters leave {gigabytes(kept)} "
            f"and take {gigabytes(passing)} more for checkpoints while they train: {advice}free some or choose another "
            "output"
        )


def gigabytes(count: float) -> str:
    """Bytes for a reader: `3.6 GB`, `12 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of space: Python has an error number for it, libraries have words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove(folder: Path, keep: Path) -> None:
    for old in folder.glob("checkpoint-*"):
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()

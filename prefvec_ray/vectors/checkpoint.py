"""A base model under its checkpoint's names: one naming for folders and live models.

transformers 5 renames parameters and fuses experts while loading (`experts.3.w1.weight` becomes a slice of
`experts.gate_up_proj`). Vectors, fingerprints and merges here always speak the names of the files; `checkpoint_state`
gives a live model's parameters under those names, as views.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_json
from prefvec_ray.vectors.shards import Shards

# Constants that old checkpoints store and transformers recomputes.
RECOMPUTED = ("rotary_emb.inv_freq",)
HEADS = ("lm_head.weight", "embed_out.weight")


class Checkpoint(Mapping[str, Tensor]):
    """A `save_pretrained` folder of safetensors, sharded or not, read lazily. Tied copies are left out.

    These are the weights that transformers loads. Raises InputError for folders without safetensors, with pickles only,
    with an index that cannot be trusted, with two models, or with an adapter beside the model.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        adapter = self.folder / "adapter_config.json"
        if adapter.is_file() and (self.folder / "config.json").is_file():
            raise InputError(
                f"{self.folder}: holds an adapter beside the model, and transformers would load both; remove "
                f"{adapter.name} and adapter_model.safetensors, or merge the adapter into the model"
            )
        self.shards = Shards(self.folder, stem="model", links=True)
        dropped = {name for name in self.shards if name.endswith(RECOMPUTED)} | self._tied_copies()
        self._kept = {name: None for name in self.shards if name not in dropped}

    def names(self) -> list[str]:
        return list(self._kept)

    def tensor(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file."""
        if name not in self._kept:
            raise KeyError(name)
        return self.shards.tensor(name)

    __getitem__ = tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        file = (self.folder if self.folder.is_dir() else self.folder.parent) / "config.json"
        return read_json(file, "copy the base model again") if file.is_file() else {}

    def _tied_copies(self) -> set[str]:
        """Some trainers write a tied head twice. It counts once, under the embedding's name, if the bytes agree."""
        heads = [name for name in self.shards if name.endswith(HEADS)]
        return {head for head in heads if self._has_equal(head)} if heads and self._is_tied() else set()

    def _has_equal(self, head: str) -> bool:
        shape = self.shards.shape_dtype(head)
        return any(
            name != head
            and self.shards.shape_dtype(name) == shape
            and torch.equal(self.shards.tensor(head), self.shards.tensor(name))
            for name in self.shards
        )

    def _is_tied(self) -> bool:
        """What the config says, or else transformers' default for its class."""
        config = self.config()
        inner = config.get("text_config")
        for section in (config, inner if isinstance(inner, dict) else {}):
            if "tie_word_embeddings" in section:
                return bool(section["tie_word_embeddings"])
        from transformers import CONFIG_MAPPING

        kind = config.get("model_type")
        return bool(kind in CONFIG_MAPPING and getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))


class _NoCopies(TorchFunctionMode):
    """Lets transformers' split of fused weights return views: `contiguous()` would copy every expert, and `clone()`
    every parameter of a flat buffer.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in (Tensor.contiguous, Tensor.clone) else func(*args, **(kwargs or {}))


@torch.no_grad()
def checkpoint_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a live model under the names of its checkpoint files; tied weights once.

    The tensors are views of the model's own memory: writing to them changes the model. Raises InputError for a model
    that wears PEFT adapters or quantised weights, or whose layout has no such views.
    """
    live = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    if any(".base_layer." in name for name in live):
        raise InputError("the model wears PEFT adapters; give the base model itself, or its folder")
    if not hasattr(model, "save_pretrained"):
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in live.items():
            first.setdefault(_place(tensor), name)
        return {name: live[name] for name in first.values()}
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    with _NoCopies():
        untied = remove_tied_weights_from_state_dict(live, model)
        state = revert_weight_conversion(model, untied)
    memory = {_storage(tensor) for tensor in untied.values()}
    for name, tensor in state.items():
        if _storage(tensor) not in memory:
            raise InputError(f"'{name}' of {type(model).__name__} is not a view of a live parameter; use its folder")
    return {name: tensor for name, tensor in state.items() if not name.endswith(RECOMPUTED)}


@dataclass(frozen=True)
class TensorPiece:
    """Where one checkpoint tensor lies inside a live parameter, in elements of that parameter."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def checkpoint_layout(model: nn.Module) -> dict[str, list[TensorPiece]]:
    """Live parameter name -> the checkpoint tensors that it is made of; a tied parameter is listed once.

    `model` may lie on the meta device, and its parameters may be views of one flat buffer.
    """
    starts = sorted(
        (_storage(parameter), int(parameter.storage_offset()), name)
        for name, parameter in model.named_parameters()
        if parameter.numel()
    )
    layout: dict[str, list[TensorPiece]] = {}
    for name, view in checkpoint_state(model).items():
        place = (_storage(view), int(view.storage_offset()))
        position = bisect.bisect_right(starts, place, key=lambda start: start[:2]) - 1
        if position < 0 or starts[position][0] != place[0]:
            continue  # a buffer
        _, start, owner = starts[position]
        piece = TensorPiece(name, tuple(view.shape), view.stride(), place[1] - start)
        layout.setdefault(owner, []).append(piece)
    return layout


SAVE_AGAIN = (
    "load and save it once with AutoModelForCausalLM's from_pretrained and save_pretrained, and take that folder"
)


def check_names(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model with a parameter that the files of its folder do not hold: transformers makes it up, or finds it
    under another name, which a vector would not have. `model` may lie on the meta device. Raises InputError."""
    stored = Checkpoint(folder)
    for name in _parameters(model):
        if name not in stored:
            raise InputError(f"base {folder}: its files do not hold {name}, which the model has; {SAVE_AGAIN}")


@torch.no_grad()
def check_loaded(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model whose parameters are not what this project reads from the files of its folder.

    The model may be in another dtype than the files; quantized parameters are not compared. Tensors of the files that
    it does not have are left alone: those of another modality, say. Raises InputError.
    """
    check_names(model, folder)
    stored = Checkpoint(folder)
    for name, tensor in _parameters(model).items():
        if tensor.is_floating_point() and not torch.equal(stored[name].to(tensor.dtype), tensor.cpu()):
            raise InputError(f"base {folder}: transformers loads another {name} than its files hold; {SAVE_AGAIN}")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """`checkpoint_state` without buffers."""
    own = {_storage(parameter) for parameter in model.parameters()}
    return {name: tensor for name, tensor in checkpoint_state(model).items() if _storage(tensor) in own}


def state_of(source: nn.Module | Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    """Tensors under checkpoint names, of a live model (views), a folder (memory-mapped) or a state dict (itself)."""
    if isinstance(source, nn.Module):
        return checkpoint_state(source)
    return source if isinstance(source, Mapping) else Checkpoint(source)


def _storage(tensor: Tensor) -> int:
    """Identity of the memory that a tensor views; unlike its address this also tells meta tensors apart."""
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()

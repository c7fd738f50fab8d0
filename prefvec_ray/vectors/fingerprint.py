"""Which base model is this? A digest of its parameters, equal for a live model and its saved folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn

from prefvec_ray.vectors.checkpoint import state_of


def tensor_digest(tensor: Tensor) -> str:
    """blake3 hex of a tensor's dtype, shape and little-endian bytes."""
    shape = json.dumps([str(tensor.dtype), list(tensor.shape)])
    digest = blake3(shape.encode(), max_threads=torch.get_num_threads())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(model: nn.Module | Mapping[str, Tensor] | str | Path) -> str:
    """`blake3:<hex>` of all parameters (and saved buffers): checkpoint names, shapes, dtypes and bytes.

    Sharding, file order and tied copies make no difference. Loading the base in another dtype than it is stored in
    does: those are other numbers, so take the fingerprint of the folder then. Raises InputError for a folder without
    safetensors, and for a model that wears adapters.
    """
    state = state_of(model)
    digest = blake3(b"prefvec base 1\n")
    for name in sorted(state):
        digest.update(json.dumps([name, tensor_digest(state[name])]).encode())
    return f"blake3:{digest.hexdigest()}"

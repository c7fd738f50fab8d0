"""Which base model is this? A digest of its parameters, equal for a live model and its saved folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3
from torch import Tensor, nn

from prefvec_ray.vectors.checkpoint import state_of
from prefvec_ray.vectors.numbers import tensor_digest


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

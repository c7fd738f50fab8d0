"""The numbers of tensors, read once: their digests, and whether NaN or infinity is among them."""

import json
from collections.abc import Callable

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

PIECE = 4 << 20  # bytes that are hashed and searched while they are in the processor's cache
BLOCK = 1 << 18  # bytes of it that are searched at a time
Seen = Callable[[memoryview], object]
"""called with pieces of bytes, in their order"""

# The exponent of NaN and infinity is all ones: as integers, they are beyond every finite number of their sign.
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


def is_finite(values: Tensor) -> bool:
    """Is there neither NaN nor infinity in `values`?"""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.device.type == "cpu" and values.is_contiguous() and values.dtype in _INFINITY:
        pieces = _bytes(values)
        return all(_finite(pieces[start : start + BLOCK], values.dtype) for start in range(0, len(pieces), BLOCK))
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())  # aminmax hands NaN on


def tensor_digest(tensor: Tensor) -> str:
    """blake3 hex of a tensor's dtype, shape and little-endian bytes."""
    return read_tensor(tensor, check=False)[0]


def read_tensor(tensor: Tensor, *, check: bool = True, seen: Seen | None = None) -> tuple[str, bool]:
    """`tensor_digest` and, with `check`, `is_finite`, in one pass; `seen` gets the bytes too."""
    values = tensor.detach().cpu().contiguous()
    hasher = blake3(json.dumps([str(values.dtype), list(values.shape)]).encode(), max_threads=blake3.AUTO)
    check, finite = check and values.dtype in _INFINITY, True
    data = _bytes(values)
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        hasher.update(piece.data)
        if seen is not None:
            seen(piece.data)
        for at in range(0, len(piece) if check and finite else 0, BLOCK):
            finite = finite and _finite(piece[at : at + BLOCK], values.dtype)
    return hasher.hexdigest(), finite


def _bytes(values: Tensor) -> np.ndarray:
    flat = values.reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _finite(piece: np.ndarray, dtype: torch.dtype) -> bool:
    size, infinity = dtype.itemsize, _INFINITY[dtype]
    sign = 1 << (8 * size - 1)
    return int(piece.view(f"i{size}").max()) < infinity and int(piece.view(f"u{size}").max()) < sign + infinity

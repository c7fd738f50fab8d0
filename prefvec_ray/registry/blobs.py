"""Blobs are named after their bytes."""

import re
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.names import shown

CHUNK = 8 << 20


def blob_key(digest: str) -> str:
    """`blake3:<hex>` -> `blobs/<hex>`; InputError for anything else."""
    if not isinstance(digest, str) or not re.fullmatch(r"blake3:[0-9a-f]{64}", digest):
        raise InputError(f"digest {shown(digest)}: expected 'blake3:' and 64 hexadecimal digits")
    return f"blobs/{digest[7:]}"


def hash_file(path: str | Path) -> str:
    """`blake3:<hex>` of a file, memory-mapped and on all cores: faster than the disk that it comes from."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return f"blake3:{hasher.hexdigest()}"


def hash_pieces(pieces: Iterable[bytes]) -> str:
    """`blake3:<hex>` of bytes that come in pieces."""
    hasher = blake3(max_threads=blake3.AUTO)
    for piece in pieces:
        hasher.update(piece)
    return f"blake3:{hasher.hexdigest()}"

"""Which base model is this? A digest of its parameters, equal for a live model and its saved folder."""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3
from torch import Tensor, nn

from prefvec_ray.vectors.checkpoint import Checkpoint, state_of
from prefvec_ray.vectors.numbers import tensor_digest

SETTLED_NS = 2_000_000_000
"""age from which a file that changes again is certain to get another time"""

FileState = tuple[str, int, int, int]


def fingerprint(model: nn.Module | Mapping[str, Tensor] | str | Path) -> str:
    """`blake3:<hex>` of all parameters (and saved buffers): checkpoint names, shapes, dtypes and bytes.

    Sharding, file order and tied copies make no difference. Loading the base in another dtype than it is stored in
    does: those are other numbers, so take the fingerprint of the folder then. A process hashes a folder once, for as
    long as its files stay as they are (path, size, time of change, inode). Raises InputError for a folder without
    safetensors, and for a model that wears adapters.
    """
    if isinstance(model, Checkpoint):
        model = model.folder
    if isinstance(model, str | Path):
        files = _file_states(Path(model))
        settled = time.time_ns() - max((changed for _, _, changed, _ in files), default=0) > SETTLED_NS
        return (_of_files if settled else _of_files.__wrapped__)(Path(model), files)
    return _of_state(state_of(model))


@functools.lru_cache(maxsize=64)
def _of_files(folder: Path, files: tuple[FileState, ...]) -> str:
    """`files` are in the key of the cache: other files are other numbers."""
    return _of_state(Checkpoint(folder))


def _of_state(state: Mapping[str, Tensor]) -> str:
    digest = blake3(b"prefvec base 1\n")
    for name in sorted(state):
        digest.update(json.dumps([name, tensor_digest(state[name])]).encode())
    return f"blake3:{digest.hexdigest()}"


def _file_states(folder: Path) -> tuple[FileState, ...]:
    """(path, size, time of change in ns, inode) of all files that say what the parameters are."""
    paths = [folder] if folder.is_file() else [*folder.glob("*.safetensors*")]
    config = (folder.parent if folder.is_file() else folder) / "config.json"
    states = [(str(path.resolve()), path.stat()) for path in [*paths, config] if path.is_file()]
    return tuple(sorted((path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in states))

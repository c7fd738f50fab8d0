"""A full-form vector that several processes write together, each its part: no process holds it as a whole."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from prefvec_ray.common.atomic import sync
from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.file import STEM, VectorInfo, replace_metadata, to_metadata
from prefvec_ray.vectors.writer import write_text

RESERVE = 4096
"""Bytes of a header kept free for what is known only when every part is written."""
INDEX = f"{STEM}.safetensors.index.json"


class PartWriter:
    """One process's part of a vector in fp32: `add` every entry, then `finish`.

    Entries are collected in memory until they fill a shard of `shard_size` bytes. What is written is no vector until
    `write_index` has joined the parts of all.
    """

    def __init__(self, folder: Path, number: int, info: VectorInfo, *, shard_size: int = 1 << 30):
        """number: of this process. info: what is known of the vector before its entries are."""
        self.folder, self.number, self.info, self.shard_size = folder, number, info, shard_size
        self.files: dict[str, dict[str, int]] = {}
        """Of every shard written so far: its name, and the bytes of each entry in it."""
        self._held: dict[str, Tensor] = {}
        self._size = 0

    def add(self, name: str, change: Tensor) -> None:
        """phi of one parameter: fp32, contiguous, on the CPU, finite and not zero throughout."""
        self._held[name] = change
        self._size += change.nbytes
        if self._size >= self.shard_size:
            self._flush()

    def _flush(self) -> None:
        file = f".{STEM}.{self.number}-{len(self.files)}.safetensors"
        save_file(self._held, self.folder / file, to_metadata(self.info) | {"format": "prefvec" + " " * RESERVE})
        self.files[file] = {name: tensor.nbytes for name, tensor in self._held.items()}
        self._held, self._size = {}, 0

    def finish(self, precision: Mapping[str, JsonValue]) -> dict[str, dict[str, int]]:
        """Write what is left and every header again, with what all processes measured. Returns `files`."""
        if self._held:
            self._flush()
        metadata = to_metadata(self.info.model_copy(update={"precision": dict(precision)}))
        for file in self.files:
            replace_metadata(self.folder / file, metadata)
            sync(self.folder / file)
        return self.files


def write_index(folder: Path, parts: Sequence[Mapping[str, Mapping[str, int]]]) -> None:
    """Make a vector of the parts that all processes have finished: one of them gives the shards their names and, of
    several, writes the index last.

    Raises:
        InputError: the vector is empty.
    """
    files = {file: entries for part in parts for file, entries in part.items()}
    if not files:
        raise InputError("nothing was trained: the run changes no parameter")
    if len(files) == 1:
        (folder / next(iter(files))).rename(folder / f"{STEM}.safetensors")
        sync(folder)
        return
    weight_map: dict[str, str] = {}
    for number, (file, entries) in enumerate(sorted(files.items()), 1):
        name = f"{STEM}-{number:05}-of-{len(files):05}.safetensors"
        (folder / file).rename(folder / name)
        weight_map |= dict.fromkeys(entries, name)
    sync(folder)
    total = sum(size for entries in files.values() for size in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=1, sort_keys=True))

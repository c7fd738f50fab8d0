"""Sharded safetensors files that never lie in memory as a whole.

Tensors are produced a few megabytes at a time by a small pool of threads and written in place, laid out as
`safetensors` itself does it. Headers go in last, so that a file whose writing was cut short is not a safetensors file.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from prefvec_ray.common.errors import InputError

CHUNK = 4 << 20  # bytes that one thread produces and writes at a time
SYNC = 512 << 20  # bytes after which the disk is set to work, so that it does not wait for the last byte
# safetensors' own order of tensors in a file: by dtype, last of this list first, then by name.
DTYPE_CODES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"}
DTYPE_CODES |= {torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64"}
DTYPE_CODES |= {torch.int64: "I64"}
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}

Index = tuple[int | slice, ...]
Progress = Callable[[int, int], object]
"""called with (bytes written, bytes in all)"""
Produce = Callable[[str, Index, Tensor], Tensor]
"""`produce(name, index, scratch)` returns tensor[index], contiguous: in `scratch`, which has that shape and dtype, or
in any other memory that stays as it is until written"""


@dataclass(frozen=True)
class _Shard:
    file: str
    descriptor: int
    start: int  # of the data, after the header
    header: dict[str, dict[str, object]]


class ShardWriter:
    """Writes `<stem>*.safetensors` into `folder`: `write(produce)`, then `finish()`, then `close()`.

    `tensors` are meta tensors that give shapes and dtypes; `metadata` goes into every file; `threads` (default
    `torch.get_num_threads()`) produce and write. Raises InputError for a
    dtype that safetensors cannot store, and where the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        tensors: Mapping[str, Tensor],
        *,
        max_shard_size: int | str,
        threads: int | None = None,
        metadata: Mapping[str, str] = {"format": "pt"},
    ):
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_CODES:
                raise InputError(
                    f"'{name}' is {tensor.dtype}, which cannot be written; expected one of {[*DTYPE_CODES]}"
                )
        self.total = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(folder).free
        if self.total + (64 << 20) > free:
            raise InputError(f"{folder}: needs {self.total / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
        self.folder, self.stem, self.metadata, self._tensors = folder, stem, metadata, tensors
        self._split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._shards = [self._open(file, names) for file, names in self._split.filename_to_tensors.items()]
        self._syncs: list[Future[None]] = []
        self._pool, self._syncer = ThreadPoolExecutor(threads or torch.get_num_threads()), ThreadPoolExecutor(1)

    def _open(self, file: str, names: list[str]) -> _Shard:
        header: dict[str, dict[str, object]] = {}
        offset = 0
        for name in sorted(names, key=lambda name: (-RANKS[self._tensors[name].dtype], name)):
            tensor = self._tensors[name]
            span = [offset, offset := offset + tensor.nbytes]
            header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        start = len(_encoded(header, self.metadata))
        descriptor = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.truncate(descriptor, start + offset)
        return _Shard(file, descriptor, start, header)

    def write(self, produce: Produce, progress: Progress | None = None) -> None:
        """Produce and write every tensor. Returns while the disk is still being synced; `finish` waits for that."""
        scratch = threading.local()
        writing = threading.Lock()  # a file's inode takes one write at a time, and the kernel would spin for it

        def chunk(shard: _Shard, name: str, index: Index, offset: int) -> int:
            like = self._tensors[name][index]
            if not hasattr(scratch, "bytes") or len(scratch.bytes) < like.nbytes:
                scratch.bytes = torch.empty(max(CHUNK, like.nbytes), dtype=torch.uint8)
            out = produce(name, index, scratch.bytes[: like.nbytes].view(like.dtype).view(like.shape))
            view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            written = 0
            with writing:
                while written < len(view):
                    written += os.pwrite(shard.descriptor, view[written:], offset + written)
            return written

        done = synced = 0
        for shard in self._shards:
            jobs = [self._pool.submit(chunk, shard, *job) for job in self._chunks(shard)]
            for job in jobs:
                done += job.result()
                if progress is not None:
                    progress(done, self.total)
                if job is jobs[-1] or done - synced >= SYNC:
                    synced = done
                    self._syncs.append(self._syncer.submit(os.fsync, shard.descriptor))

    def _chunks(self, shard: _Shard) -> Iterator[tuple[str, Index, int]]:
        for name, entry in shard.header.items():
            offset = shard.start + entry["data_offsets"][0]  # type: ignore[index]
            for index in row_chunks(self._tensors[name]):
                yield name, index, offset
                offset += self._tensors[name][index].nbytes

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the headers and the index, and see everything safely on disk.

        `metadata` may replace what was announced by something as long: digests that were not known before, say.
        """
        for sync in self._syncs:
            sync.result()
        for shard in self._shards:
            header = _encoded(shard.header, metadata or self.metadata)
            assert len(header) == shard.start, "the metadata is not as long as what was announced"
            os.pwrite(shard.descriptor, header, 0)
            os.fsync(shard.descriptor)
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            write_text(self.folder / f"{self.stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))

    def close(self) -> None:
        """Let go of threads and files, finished or not."""
        for pool in (self._pool, self._syncer):
            pool.shutdown(wait=True, cancel_futures=True)
        for shard in self._shards:
            os.close(shard.descriptor)
        self._shards = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def row_chunks(tensor: Tensor) -> Iterator[Index]:
    """Indices that cut a tensor into contiguous parts of at most CHUNK bytes (or one row), in order."""
    if tensor.numel() == 0:
        return
    if tensor.dim() == 0:
        yield ()
    elif tensor.dim() > 2:
        for lead in range(len(tensor)):
            yield from ((lead, *rest) for rest in row_chunks(tensor[lead]))
    else:
        step = max(1, CHUNK // max(1, tensor.element_size() * math.prod(tensor.shape[1:])))
        yield from ((slice(start, min(start + step, len(tensor))),) for start in range(0, len(tensor), step))


def _encoded(header: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header with its length before it, padded with blanks to a multiple of 8."""
    text = json.dumps({"__metadata__": metadata} | dict(header), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_text(path: Path, text: str) -> None:
    """A text file, synced to disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

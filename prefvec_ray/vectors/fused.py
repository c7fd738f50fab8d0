"""out = round(base + sum_k eta_k phi_k) over many tensors, in one pass and without a temporary of their size.

The sum is taken in fp32, term by term in the order given, each product and each sum rounded once, and the
result is rounded once to the output's dtype. Two paths give the same bits: `_native/merge.cpp` (CPU, where
a compiler is), and torch, tile by tile, on any device. A term whose eta is 0 is not read.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefvec_ray.vectors._native import merge_library
from prefvec_ray.vectors.entries import Entry, Full, Int8, LowRank

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
SEGMENT = [("out", "u8"), ("base", "u8"), ("n", "i8"), ("out_dtype", "i4"), ("base_dtype", "i4")]
SEGMENT += [("first_term", "i4"), ("n_terms", "i4")]
TERM = [("data", "u8"), ("scale", "u8"), ("row", "i8"), ("dtype", "i4"), ("eta", "i4")]
ALIGN = 64  # elements: at least 128 bytes of any floating dtype, whole cache lines for non-temporal stores
# Elements of fp32 scratch: a share of L2 on CPU, a third of an H100's L2 on CUDA, where launches cost more
# than bytes.
TILE = {"cpu": 1 << 18, "cuda": 1 << 22}


@dataclass(frozen=True)
class Segment:
    """One tensor to compute. `out`, `base` and every entry have one shape; `terms` are (index of eta,
    entry)."""

    name: str
    out: Tensor
    base: Tensor
    terms: tuple[tuple[int, Entry], ...]


class FusedMerge:
    """A prepared pass over `segments`; `run(eta)` may be called any number of times and allocates next to nothing.

    `threads` (default `torch.get_num_threads()`) is for the compiled path; the torch path uses torch's own threads.
    Low-rank terms are multiplied out by torch in either case, a tile of rows at a time.
    """

    def __init__(self, segments: Sequence[Segment], *, threads: int | None = None, native: bool = True):
        self.threads = threads
        self._library = merge_library() if native else None
        flat = [part for segment in segments for part in _at_most_2d(segment)]
        compiled = [self._library is not None and _fits_kernel(segment) for segment in flat]
        self._compiled = [segment for segment, chosen in zip(flat, compiled, strict=True) if chosen]
        self._tiled = [segment for segment, chosen in zip(flat, compiled, strict=True) if not chosen]
        if any(segment.out.device.type != "cpu" for segment in self._tiled):
            self._tiled = coalesced(self._tiled)
        self._records = _records(self._compiled)
        self._scratch: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()  # the one mode in which any tensor, made in it or not, may be written
    def run(self, eta: Sequence[float]) -> str | None:
        """Write every `out`. Returns the name of a tensor whose result holds infinity or NaN, or None."""
        bad = self._run_compiled(eta) if self._compiled else None
        checks = [(segment.name, check) for segment in self._tiled for check in self._run_tiled(segment, eta)]
        for device in {check.device for _, check in checks}:  # one wait per device, after all is queued
            here = [(name, check) for name, check in checks if check.device == device]
            finite = torch.isfinite(torch.stack([check for _, check in here])).all(-1).tolist()
            bad = bad or next((name for (name, _), fine in zip(here, finite, strict=True) if not fine), None)
        return bad

    def _run_compiled(self, eta: Sequence[float]) -> str | None:
        assert self._library is not None
        segments, terms = self._records
        numbers = np.asarray(eta, dtype=np.float32)
        index = self._library.prefvec_merge(
            segments.ctypes.data,
            len(segments),
            terms.ctypes.data,
            numbers.ctypes.data,
            self.threads or torch.get_num_threads(),
        )
        return None if index < 0 else self._compiled[index].name

    def _run_tiled(self, segment: Segment, eta: Sequence[float]) -> list[Tensor]:
        """Returns the smallest and the largest result of each tile: one is infinite or NaN if any result is."""
        if not segment.out.numel():
            return []
        device, columns = segment.out.device, math.prod(segment.out.shape[1:])
        size = TILE.get(device.type, TILE["cuda"])
        sum_, product = self._borrow(device, max(size, columns))
        active = [(float(np.float32(eta[k])), entry) for k, entry in segment.terms if np.float32(eta[k]) != 0]
        factors = {id(entry): entry.A_RI.float() for _, entry in active if isinstance(entry, LowRank)}
        checks, step = [], max(1, size // max(1, columns))
        for start in range(0, len(segment.out), step):
            rows = slice(start, start + step)
            out = segment.out[rows]
            acc, phi = (scratch[: out.numel()].view(out.shape) for scratch in (sum_, product))
            acc.copy_(segment.base[rows])
            for factor, entry in active:
                if isinstance(entry, LowRank):
                    acc.addmm_(entry.B_OR[rows].float(), factors[id(entry)], alpha=factor)
                    continue
                phi.copy_(entry.values[rows])
                if isinstance(entry, Int8):
                    phi.mul_(entry.scale[rows].unsqueeze(-1))
                acc.add_(phi.mul_(factor))
            out.copy_(acc)
            checks.append(torch.stack(torch.aminmax(out)).float())  # isfinite(out) takes three times all the rest
        return checks

    def _borrow(self, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        kept = self._scratch.get(device)
        if kept is None or kept[0].numel() < size:
            kept = (torch.empty(size, device=device), torch.empty(size, device=device))
            self._scratch[device] = kept
        return kept


def _at_most_2d(segment: Segment) -> list[Segment]:
    """Stacks of matrices (experts) one matrix at a time, scalars as one element."""
    if segment.out.dim() == 0:
        return [_map(segment, lambda tensor: tensor.reshape(1))]
    if segment.out.dim() == 1:
        terms = [(k, Full(e.dense()) if isinstance(e, Int8) else e) for k, e in segment.terms]
        return [replace(segment, terms=tuple(terms))]
    if segment.out.dim() == 2:
        return [segment]
    matrices = (_map(segment, operator.itemgetter(index)) for index in range(len(segment.out)))
    return [part for matrix in matrices for part in _at_most_2d(matrix)]


def _map(segment: Segment, change: Callable[[Tensor], Tensor]) -> Segment:
    """The same change to output, base and every part of every entry."""
    terms = tuple((k, type(entry)(*map(change, entry.parts().values()))) for k, entry in segment.terms)
    return replace(segment, out=change(segment.out), base=change(segment.base), terms=terms)


def part_of(entry: Entry, index: tuple[int | slice, ...]) -> Entry:
    """What an entry says of tensor[index], where the index is that of a run of rows (or of elements, in one
    dimension).
    """
    if isinstance(entry, LowRank):
        lead = index[:-1]
        return LowRank(entry.A_RI[lead], entry.B_OR[index])
    if isinstance(entry, Int8):
        if entry.values.dim() > 1:
            return Int8(entry.values[index], entry.scale[index])
        entry = Full(entry.dense())
    return Full(entry.values[index])


def _fits_kernel(segment: Segment) -> bool:
    tensors = [segment.out, segment.base]
    for _, entry in segment.terms:
        if isinstance(entry, LowRank):
            return False
        tensors += entry.parts().values()
    return all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in CODES for t in tensors)


def _records(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    rows: list[tuple[int, ...]] = []
    terms: list[tuple[int, ...]] = []
    for segment in segments:
        out, base = segment.out, segment.base
        codes = (CODES[out.dtype], CODES[base.dtype], len(terms), len(segment.terms))
        rows.append((out.data_ptr(), base.data_ptr(), out.numel(), *codes))
        for k, entry in segment.terms:
            assert isinstance(entry, Full | Int8)
            scale = entry.scale.data_ptr() if isinstance(entry, Int8) else 0
            values = entry.values
            terms.append((values.data_ptr(), scale, values.shape[-1], CODES[values.dtype], k))
    return np.array(rows, dtype=SEGMENT), np.array(terms, dtype=TERM)


def coalesced(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours in memory become one long segment, so that a device is given few large tensors, not many
    small ones.

    Two segments join when output, base and all terms lie in the same storages with the same gap of at most
    ALIGN elements between them; `packed` lays tensors out that way. The gap is computed along and never
    read.
    """
    joined: list[Segment] = []
    for segment in segments:
        longer = _joined(joined[-1], segment) if joined else None
        if longer is None:
            joined.append(segment)
        else:
            joined[-1] = longer
    return joined


def _joined(left: Segment, right: Segment) -> Segment | None:
    pairs = [(left.out, right.out), (left.base, right.base)]
    if [k for k, _ in left.terms] != [k for k, _ in right.terms]:
        return None
    for (_, one), (_, other) in zip(left.terms, right.terms, strict=True):
        if not (isinstance(one, Full) and isinstance(other, Full)):
            return None
        pairs.append((one.values, other.values))
    gaps = {_gap(one, other) for one, other in pairs}
    gap = gaps.pop()
    if gaps or gap is None:
        return None
    length = left.out.numel() + gap + right.out.numel()
    return _map(left, lambda tensor: tensor.as_strided((length,), (1,)))


def _gap(left: Tensor, right: Tensor) -> int | None:
    """Elements between the end of one tensor and the start of the next, or None where they are not
    neighbours."""
    same = left.dtype == right.dtype and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    gap = int(right.storage_offset()) - int(left.storage_offset()) - left.numel()
    contiguous = left.is_contiguous() and right.is_contiguous()
    return gap if same and contiguous and 0 <= gap < ALIGN else None


def flat_views(tensors: Sequence[Tensor], devices: Sequence[torch.device] | None = None) -> list[Tensor]:
    """Tensors like these, as views of one new zeroed buffer per device and dtype, in order, each at a
    multiple of ALIGN.

    They lie on the tensors' own devices, or on `devices`.
    """
    on = devices or [tensor.device for tensor in tensors]
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    starts = []
    for tensor, device in zip(tensors, on, strict=True):
        start = sizes.get((device, tensor.dtype), 0)
        starts.append(start)
        sizes[device, tensor.dtype] = start + -(-tensor.numel() // ALIGN) * ALIGN
    with torch.inference_mode(any(tensor.is_inference() for tensor in tensors)):
        buffers = {key: torch.zeros(size, dtype=key[1], device=key[0]) for key, size in sizes.items()}
    return [
        buffers[device, tensor.dtype][start : start + tensor.numel()].view(tensor.shape)
        for tensor, device, start in zip(tensors, on, starts, strict=True)
    ]


def packed(tensors: Sequence[Tensor], devices: Sequence[torch.device] | None = None) -> list[Tensor]:
    """Copies of the tensors in `flat_views`."""
    return [view.copy_(tensor) for view, tensor in zip(flat_views(tensors, devices), tensors, strict=True)]

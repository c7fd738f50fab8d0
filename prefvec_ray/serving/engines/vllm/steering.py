"""Preference vectors beside the layers of a vLLM model, in buffers of a fixed size.

    y = x W^T + ((x A^T) * S) B

A and B hold all vectors side by side: a vector of rank r has r of the C *columns*, the same in every layer. S has a row
for each token of the packed batch: the coefficient of its request, in the columns of that vector. All three are buffers
that are made before the model is compiled or captured. So another vector or other coefficients are a copy into them,
and compiled code and CUDA graphs stay as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import direct_register_custom_op

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.vllm.shape import SteeringShape, pattern, width
from prefvec_ray.vectors import LowRank, PreferenceVector
from prefvec_ray.vectors._native import steer_library
from prefvec_ray.vectors.row_steering import add_steered


def _add_steered(y: Tensor, x: Tensor, A: Tensor, scales: Tensor, B: list[Tensor], starts: list[int]) -> None:
    add_steered(y, x, A, scales, B, starts)


def _adds_nothing(y: Tensor, x: Tensor, A: Tensor, scales: Tensor, B: list[Tensor], starts: list[int]) -> None:
    """For tracing."""


OPERATORS = torch.library.Library("prefvec", "FRAGMENT")
"""`torch.ops.prefvec`; it must live as long as its operators"""
direct_register_custom_op(
    "add_steered", _add_steered, mutates_args=["y"], fake_impl=_adds_nothing, target_lib=OPERATORS, dispatch_key="CPU"
)


class SteeringBuffers:
    """The buffers of a model, and what is in them.

    `tokens` is the most tokens of a step. Raises InputError for a layer that `shape` names and that cannot be steered.
    """

    def __init__(self, model: nn.Module, shape: SteeringShape, tokens: int, device: torch.device):
        self._shape = shape
        self._packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
        self._columns = Columns(shape.columns)
        self._scales_TC = torch.zeros(tokens, shape.columns, device=device)
        self._tokens = 0
        self._step: object = None
        self._layers: dict[str, _Layer] = {}
        self._norms: dict[str, SteeredNorm] = {}
        for path, module in list(model.named_modules()):
            if isinstance(module, LinearBase):
                parts = [i for i, leaf in enumerate(self._leaves(path)) if pattern(leaf) in shape.linears]
                if parts:
                    self._layers[path] = _Layer(module, parts, self._scales_TC)
            elif isinstance(module, RMSNorm | GemmaRMSNorm) and pattern(path) in shape.norms:
                parent, _, leaf = path.rpartition(".")
                self._norms[path] = SteeredNorm(module, self._scales_TC)
                setattr(model.get_submodule(parent), leaf, self._norms[path])

    @property
    def names(self) -> frozenset[str]:
        """Of the vectors in the buffers."""
        return frozenset(self._columns.of)

    def load(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """Hold these vectors, by name, and no others. A vector that is here already keeps its columns.

        Raises InputError, and changes nothing, for a vector that does not fit: more columns than there are, a layer
        that was not prepared, a shape that is not the model's, a kind of change that cannot be steered here.
        """
        digests = {name: vector.digest() for name, vector in vectors.items()}
        columns = self._columns.placed({name: (digests[name], width(vector)) for name, vector in vectors.items()})
        low_rank: dict[str, dict[int, list[tuple[list[int], LowRank]]]] = {path: {} for path in self._layers}
        norms: dict[str, list[tuple[int, Tensor]]] = {path: [] for path in self._norms}
        for key in {digest: name for name, digest in digests.items()}.values():  # names of one vector share its columns
            for name, entry in vectors[key].entries.items():
                path, part = self._place(name)
                if path in self._layers and name.endswith(".weight") and isinstance(entry, LowRank):
                    self._layers[path].check(key, name, part, entry)
                    low_rank[path].setdefault(part, []).append((columns[key][: entry.rank], entry))
                elif path in self._norms and name.endswith(".weight"):
                    self._norms[path].check(key, name, entry.shape)
                    norms[path].append((columns[key][0], entry.dense()))
                else:
                    raise InputError(
                        f"vector '{key}' changes '{name}', which cannot be steered in vLLM. Low-rank changes of linear"
                        " layers and changes of RMS norms can, in layers that a vector changed at its start."
                        " Start it again with this vector, or serve it with mode: merged"
                    )
        for path, layer in self._layers.items():
            layer.fill(low_rank[path])
        for path, norm in self._norms.items():
            norm.fill(norms[path])
        self._columns.of, self._columns.digests = columns, digests
        self._step = None

    def set_step(self, requests: Sequence[tuple[Mapping[str, float], int]]) -> None:
        """The coefficients and the number of tokens of each request of the step, in the order of the packed batch.

        Costs nothing where the step has the requests of the one before, with a token each.
        """
        if requests == self._step:
            return
        rows_RC = torch.zeros(len(requests), self._shape.columns)
        for row, (etas, _) in enumerate(requests):
            for name, eta in etas.items():
                rows_RC[row, self._columns.of[name]] = eta
        counts = torch.tensor([count for _, count in requests])
        owner = torch.arange(len(requests)).repeat_interleave(counts)
        device, tokens = self._scales_TC.device, len(owner)
        torch.index_select(rows_RC.to(device), 0, owner.to(device), out=self._scales_TC[:tokens])
        self._scales_TC[tokens : self._tokens] = 0.0
        self._tokens, self._step = tokens, list(requests)

    def _leaves(self, path: str) -> list[str]:
        """The layers of the checkpoint that vLLM keeps as this one."""
        parent, _, leaf = path.rpartition(".")
        return [f"{parent}.{name}" if parent else name for name in self._packed.get(leaf, [leaf])]

    def _place(self, name: str) -> tuple[str, int]:
        """Path of the module that holds this parameter of the checkpoint, and which part of it the parameter is."""
        path = name.rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        for packed, leaves in self._packed.items():
            if leaf in leaves and len(leaves) > 1 and f"{parent}.{packed}" in self._layers:
                return f"{parent}.{packed}", list(leaves).index(leaf)
        return path, 0


@dataclass
class Columns:
    """Which columns belong to which vector."""

    count: int

    def __post_init__(self) -> None:
        self.of: dict[str, list[int]] = {}
        self.digests: dict[str, str] = {}

    def placed(self, wanted: Mapping[str, tuple[str, int]]) -> dict[str, list[int]]:
        """Columns for vectors of these digests and widths. Names of one digest share theirs.

        Raises InputError where there are too few."""
        kept = {self.digests[name]: columns for name, columns in self.of.items()}
        by_digest = {digest: kept[digest] for digest, _ in wanted.values() if digest in kept}
        used = {column for columns in by_digest.values() for column in columns}
        free = [column for column in range(self.count) if column not in used]
        for name, (digest, needed) in wanted.items():
            if digest not in by_digest:
                if needed > len(free):
                    raise InputError(
                        f"vector '{name}' needs {needed} columns, and {len(free)} of {self.count} are free; vectors of"
                        " running requests keep theirs. Wait until those have ended, or start again with more `columns`"
                    )
                by_digest[digest], free = free[:needed], free[needed:]
        return {name: by_digest[digest] for name, (digest, _) in wanted.items()}


class SteeredMethod(LinearMethodBase):
    """How a layer multiplies: as before, and the vectors' share added. Wraps what the layer had, quantized or not."""

    def __init__(self, inner: Any, bounds: Sequence[tuple[int, int]], parts: Sequence[int], compiled: bool):
        """`bounds` of all parts of the outputs, and which `parts` are steered; `compiled`: by `add_steered`."""
        self.inner, self.bounds, self.parts, self.compiled = inner, tuple(bounds), tuple(parts), compiled

    def create_weights(self, layer: nn.Module, *args: Any, **named: Any) -> None:
        raise RuntimeError("a layer is steered after its weights were made")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner.apply(layer, x, bias)
        scales_TC = layer.prefvec_scales[: x.shape[0]]
        if self.compiled:
            B = [getattr(layer, f"prefvec_B{place}") for place in range(len(self.parts))]
            starts = [self.bounds[part][0] for part in self.parts]
            torch.ops.prefvec.add_steered(y, x, layer.prefvec_A, scales_TC, B, starts)
            return y
        # Out of place: in code that torch compiles, each write into a part of y would copy y.
        xA = linear(x, layer.prefvec_A)
        if len(self.bounds) == 1:
            return torch.addmm(y, (xA * scales_TC).to(y.dtype), layer.prefvec_B0)
        xA = xA.view(x.shape[0], len(self.parts), scales_TC.shape[1]) * scales_TC.unsqueeze(1)
        pieces = []
        for index, (start, stop) in enumerate(self.bounds):
            piece = y[:, start:stop]
            if index in self.parts:
                place = self.parts.index(index)
                piece = torch.addmm(piece, xA[:, place].to(y.dtype), getattr(layer, f"prefvec_B{place}"))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class _Layer:
    """One linear layer of this rank, with its buffers. What vLLM keeps as one layer may be several of the checkpoint's.

    Where the inputs are what is split over the ranks, A is split like them, and the layer itself adds up the partial
    sums of y. Where the outputs are split, B is.
    """

    def __init__(self, module: Any, parts: Sequence[int], scales_TC: Tensor):
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear):
            raise InputError(
                f"layers of kind {type(module).__name__} cannot be steered in vLLM; serve with mode: merged"
            )
        if isinstance(module, RowParallelLinear) and module.tp_size > 1 and not module.input_is_parallel:
            raise InputError(f"layers of kind {type(module).__name__} that split their own input cannot be steered")
        self.module, self.parts, columns = module, tuple(parts), scales_TC.shape[1]
        sizes = _local_sizes(module)
        bounds = [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        inputs = module.input_size_per_partition if isinstance(module, RowParallelLinear) else module.input_size
        like = {"dtype": module.params_dtype, "device": scales_TC.device}
        module.register_buffer("prefvec_scales", scales_TC, persistent=False)
        module.register_buffer("prefvec_A", torch.zeros(len(parts) * columns, inputs, **like), persistent=False)
        for place, part in enumerate(parts):
            B_CO = torch.zeros(columns, sizes[part], **like)
            module.register_buffer(f"prefvec_B{place}", B_CO, persistent=False)
        on_cpu = scales_TC.device.type == "cpu" and module.params_dtype == torch.float32
        compiled = on_cpu and steer_library() is not None
        module.quant_method = SteeredMethod(module.quant_method, bounds, parts, compiled)

    def check(self, key: str, name: str, part: int, entry: LowRank) -> None:
        """InputError where this entry of a vector does not fit."""
        if part not in self.parts:
            raise InputError(
                f"vector '{key}' changes '{name}', which no vector changed when this vLLM was started; start it again"
            )
        expected = _whole_shape(self.module, part)
        if tuple(entry.shape) != expected:
            raise InputError(f"vector '{key}': '{name}' has shape {tuple(entry.shape)}, in the model {expected}")

    def fill(self, terms: Mapping[int, Sequence[tuple[list[int], LowRank]]]) -> None:
        module, columns = self.module, self.module.prefvec_scales.shape[1]
        A_CI = torch.zeros(module.prefvec_A.shape)
        for place, part in enumerate(self.parts):
            B_CO = getattr(module, f"prefvec_B{place}")
            filled = torch.zeros(B_CO.shape)
            for own, entry in terms.get(part, ()):
                A_RI = entry.A_RI.float()
                if isinstance(module, RowParallelLinear):
                    A_RI = A_RI[:, module.tp_rank * A_CI.shape[1] : (module.tp_rank + 1) * A_CI.shape[1]]
                A_CI[[place * columns + column for column in own]] = A_RI
                filled[own] = entry.B_OR[_own_rows(module, part)].float().mT
            B_CO.copy_(filled)
        module.prefvec_A.copy_(A_CI)


class SteeredNorm(nn.Module):
    """x / rms(x) * (w + sum_p eta_p phi_p) in place of vLLM's layer; as there, x is the sum with a residual, if any."""

    def __init__(self, base: Any, scales_TC: Tensor):
        super().__init__()
        self.base, self._size = base, base.weight.shape[0]
        phi_CH = torch.zeros(scales_TC.shape[1], self._size, device=scales_TC.device)
        self.register_buffer("prefvec_phi", phi_CH, persistent=False)
        self.register_buffer("prefvec_scales", scales_TC, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            summed = x
            y = self.base(x)
        else:
            y, summed = self.base(x, residual)
        exact = summed.float()
        unit = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.base.variance_epsilon)
        change = self.prefvec_scales[: x.shape[0]] @ self.prefvec_phi
        if x.dim() == 3:  # queries or keys: (tokens, heads, size of a head)
            change = change.unsqueeze(1)
        y = y + (unit * change).to(y.dtype)
        return y if residual is None else (y, summed)

    def check(self, key: str, name: str, shape: Sequence[int]) -> None:
        """InputError where this entry of a vector does not fit."""
        if tuple(shape) != (self._size,):
            raise InputError(f"vector '{key}': '{name}' has shape {tuple(shape)}, in the model {(self._size,)}")

    def fill(self, terms: Iterable[tuple[int, Tensor]]) -> None:
        phi_CH = torch.zeros(self.prefvec_phi.shape)
        for column, values in terms:
            phi_CH[column] = values
        self.prefvec_phi.copy_(phi_CH)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # what models read of the layer: weight, variance_epsilon


def _local_sizes(module: Any) -> list[int]:
    """Outputs that this rank computes, part by part."""
    if isinstance(module, QKVParallelLinear):
        head, kv_heads = module.head_size, module.num_kv_heads
        return [module.num_heads * head, kv_heads * head, kv_heads * module.v_head_size]
    sizes = getattr(module, "output_sizes", None) or [module.output_size]
    return [size // module.tp_size for size in sizes] if isinstance(module, ColumnParallelLinear) else list(sizes)


def _whole_shape(module: Any, part: int) -> tuple[int, int]:
    """(outputs, inputs) of one part of the layer, over all ranks."""
    if isinstance(module, QKVParallelLinear):
        heads = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)[part]
        return heads * (module.v_head_size if part == 2 else module.head_size), module.input_size
    sizes = getattr(module, "output_sizes", None) or [module.output_size]
    return (sizes[part], module.input_size) if part < len(sizes) else (-1, module.input_size)


def _own_rows(module: Any, part: int) -> slice:
    """Which rows of a part's B this rank computes."""
    if not isinstance(module, ColumnParallelLinear):
        return slice(None)
    shard = module.tp_rank
    if isinstance(module, QKVParallelLinear) and part:
        shard //= module.num_kv_head_replicas
    size = _local_sizes(module)[part]
    return slice(shard * size, (shard + 1) * size)

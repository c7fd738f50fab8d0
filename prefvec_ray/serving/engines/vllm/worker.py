"""Preference vectors inside vLLM's workers, where the weights are.

vLLM mixes `PreferenceWorker` into its worker class (`worker_extension_cls`); `VllmEngine` calls it by `collective_rpc`.
Two ways, as in `slots/weights.py`: steered, every token of a packed batch under its request's coefficients; merged,
weights rewritten by vLLM's own reload.

This rests on names that vLLM does not promise: the runner's `execute_model`, `_model_forward`, `input_batch.req_ids`
and `requests`, and the sizes that parallel linear layers keep. `pyproject.toml` pins the version they were tested with.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.vllm.engine import ETAS
from prefvec_ray.vectors import LowRank, PreferenceVector, load_vector, merged_weights
from prefvec_ray.vectors.entries import Entry
from prefvec_ray.vectors.live import check_base
from prefvec_ray.vectors.sites import Forward, Scales, Terms, twin


class PreferenceWorker:
    """What `collective_rpc` may call. Every method returns what is wrong with its input, or None: an exception would
    reach the caller as one of vLLM's own."""

    model_runner: Any
    _vectors: Mapping[str, PreferenceVector]

    def prefvec_steer(self, folders: Mapping[str, str], base_fingerprint: str) -> str | None:
        """Know the vectors in these folders, by name, and no others."""
        try:
            steering = PackedSteering(self.model_runner.get_model(), _opened(folders, base_fingerprint))
        except InputError as error:
            return str(error)
        before: StepSteering | None = getattr(self, "_steps", None)
        if before is None:
            self._steps = StepSteering(self.model_runner, steering)
        else:
            before.replace(steering)
        return None

    def prefvec_hold(self, folders: Mapping[str, str], base_fingerprint: str) -> str | None:
        """Have these vectors ready for `prefvec_merge`."""
        try:
            self._vectors = _opened(folders, base_fingerprint)
        except InputError as error:
            return str(error)
        return None

    def prefvec_merge(self, base: str, coefficients: Mapping[str, float]) -> str | None:
        """Rewrite the weights. The model may be in any state where this failed, until it succeeds again."""
        try:
            dtype = self.model_runner.model_config.dtype
            weights = merged_weights(base, self._vectors, coefficients, dtype=dtype)
            self.model_runner.reload_weights(weights_iterator=weights)
        except InputError as error:
            return str(error)
        return None


def _opened(folders: Mapping[str, str], base_fingerprint: str) -> dict[str, PreferenceVector]:
    vectors = {name: load_vector(folder) for name, folder in folders.items()}
    for vector in vectors.values():
        check_base(vector, base_fingerprint)
    return vectors


class StepSteering:
    """Gives the layers, before each step, one row of coefficients per token of the packed batch."""

    def __init__(self, runner: Any, steering: "PackedSteering"):
        missing = [n for n in ("execute_model", "_model_forward", "input_batch", "requests") if not hasattr(runner, n)]
        if missing:
            raise RuntimeError(f"this version of vLLM has no {', '.join(missing)}; install the one that is pinned")
        self._runner, self._steering = runner, steering
        self._execute, self._forward = runner.execute_model, runner._model_forward
        self._scheduled: Mapping[str, int] = {}
        self._last: Any = None
        steering.attach()
        runner.execute_model, runner._model_forward = self._execute_model, self._model_forward

    def replace(self, steering: "PackedSteering") -> None:
        self._steering.detach()
        steering.attach()
        self._steering, self._last = steering, None

    def _execute_model(self, scheduler_output: Any, *args: Any, **named: Any) -> Any:
        self._scheduled = scheduler_output.num_scheduled_tokens
        return self._execute(scheduler_output, *args, **named)

    def _model_forward(self, *args: Any, **named: Any) -> Any:
        given = next(x for x in (*args, *named.values()) if isinstance(x, Tensor))
        self._set(given.shape[0])
        try:
            return self._forward(*args, **named)
        finally:
            self._steering.scales.active = False  # vLLM also runs the model on nothing, to measure it

    def _set(self, tokens: int) -> None:
        """One row per token, in the order of the packed batch; padding gets 0."""
        requests = self._runner.requests
        each = [
            (requests[name].sampling_params.extra_args[ETAS], self._scheduled[name])
            for name in self._runner.input_batch.req_ids
        ]
        scales, now = self._steering.scales, (tokens, each)
        if now == self._last:
            scales.active = bool(scales.rows_NP.any())
            return
        rows_RP = torch.tensor([[etas.get(name, 0.0) for name in self._steering.names] for etas, _ in each])
        rows_TP = torch.zeros(tokens, len(self._steering.names))
        filled = rows_RP.repeat_interleave(torch.tensor([count for _, count in each]), 0)
        rows_TP[: len(filled)] = filled
        scales.set(rows_TP)
        self._last = now


class PackedSteering:
    """Low-rank vectors beside the linear layers of a vLLM model, and changes of its RMS norms.

    The model sees one packed row of tokens, so coefficients have a row per token. Layers that vLLM keeps as one (q, k
    and v; gate and up) share the product with A. Under tensor parallelism each rank adds its own part of the outputs;
    where inputs are what is split, the products with A (tokens x rank) are summed over the ranks.

    Raises InputError for what cannot be steered here: full entries of linear layers, embeddings and heads, biases.
    """

    def __init__(self, model: nn.Module, vectors: Mapping[str, PreferenceVector]):
        self.names = tuple(sorted(vectors))
        self.scales = Scales(torch.zeros(1, len(self.names)))
        self._modules = dict(model.named_modules())
        self._packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
        linears: dict[str, dict[int, list[tuple[int, LowRank]]]] = {}
        norms: dict[str, list[tuple[int, Entry]]] = {}
        for column, key in enumerate(self.names):
            for name, entry in vectors[key].entries.items():
                path, part = self._place(name)
                module = self._modules.get(path)
                if isinstance(module, LinearBase) and name.endswith(".weight") and isinstance(entry, LowRank):
                    expected = _whole_shape(module, part)
                    if tuple(entry.shape) != expected:
                        shapes = f"{tuple(entry.shape)}, in the model {expected}"
                        raise InputError(f"vector '{key}': '{name}' has shape {shapes}")
                    linears.setdefault(path, {}).setdefault(part, []).append((column, entry))
                elif type(module) is RMSNorm and name.endswith(".weight"):
                    norms.setdefault(path, []).append((column, entry))
                else:
                    raise InputError(
                        f"vector '{key}' changes '{name}', which cannot be steered in vLLM (low-rank changes of linear"
                        " layers and RMS norms can); serve it with mode: merged"
                    )
        self._wrapped: dict[str, Forward] = {}
        for path, parts in linears.items():
            module = self._modules[path]
            self._wrapped[path] = _wrap_linear(module, parts, self.scales)
        for path, terms in norms.items():
            self._wrapped[path] = _wrap_norm(self._modules[path], terms, self.scales)

    def _place(self, name: str) -> tuple[str, int]:
        """Path of the module that holds this parameter of the checkpoint, and which part of it the parameter is."""
        path = name.rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        for packed, leaves in self._packed.items():
            if leaf in leaves and len(leaves) > 1 and f"{parent}.{packed}" in self._modules:
                return f"{parent}.{packed}", list(leaves).index(leaf)
        return path, 0

    def attach(self) -> None:
        for path, forward in self._wrapped.items():
            self._modules[path].forward = forward

    def detach(self) -> None:
        for path in self._wrapped:
            self._modules[path].__dict__.pop("forward", None)


def _whole_shape(module: Any, part: int) -> tuple[int, int]:
    """(outputs, inputs) of one part of the layer, over all ranks."""
    if isinstance(module, QKVParallelLinear):
        heads = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)[part]
        return heads * (module.v_head_size if part == 2 else module.head_size), module.input_size
    sizes = getattr(module, "output_sizes", None) or [module.output_size]
    return (sizes[part], module.input_size) if part < len(sizes) else (-1, module.input_size)


def _own_rows(module: Any, part: int) -> tuple[int, slice]:
    """Where a part's outputs begin in what this rank computes, and which rows of B they are."""
    tp, rank = module.tp_size, module.tp_rank
    if isinstance(module, QKVParallelLinear):
        sizes = [
            module.num_heads * module.head_size,
            module.num_kv_heads * module.head_size,
            module.num_kv_heads * module.v_head_size,
        ]
        shard = rank if part == 0 else rank // module.num_kv_head_replicas
    elif isinstance(module, ColumnParallelLinear):
        sizes, shard = [size // tp for size in module.output_sizes], rank
    else:
        sizes, shard = [module.output_size], 0
    return sum(sizes[:part]), slice(shard * sizes[part], (shard + 1) * sizes[part])


def _wrap_linear(module: Any, parts: Mapping[int, Sequence[tuple[int, LowRank]]], scales: Scales) -> Forward:
    """y += sum_p eta_p[token] (x A_p^T) B_p^T, part by part of the outputs."""
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear):
        raise InputError(f"layers of kind {type(module).__name__} cannot be steered in vLLM; serve with mode: merged")
    like = module.weight
    split = isinstance(module, RowParallelLinear) and module.tp_size > 1
    factors, places = [], []
    columns: list[int] = []
    for part, terms in sorted(parts.items()):
        start, rows = _own_rows(module, part)
        began = len(columns)
        for column, entry in terms:
            factors.append(entry.A_RI)
            columns += [column] * entry.rank
        B_RO = torch.cat([entry.B_OR[rows].mT for _, entry in terms])
        B_RO = B_RO.to(device=like.device, dtype=module.params_dtype).contiguous()
        places.append((slice(start, start + B_RO.shape[1]), slice(began, len(columns)), B_RO))
    A_RI = torch.cat(factors)
    if split:
        own = module.input_size_per_partition
        A_RI = A_RI[:, module.tp_rank * own : (module.tp_rank + 1) * own]
        if not module.input_is_parallel:
            raise InputError(f"layers of kind {type(module).__name__} that split their own input cannot be steered")
    A_RI, which = A_RI.to(device=like.device, dtype=module.params_dtype).contiguous(), tuple(columns)
    inner: Forward = type(module).forward.__get__(module)

    def forward(x: Tensor, *args: Any, **named: Any) -> Any:
        given = inner(x, *args, **named)
        if not scales.active:
            return given
        y = given[0] if isinstance(given, tuple) else given
        xA = linear(x.reshape(-1, x.shape[-1]), A_RI)
        scales.multiply(xA, which, xA)
        if split:
            xA = tensor_model_parallel_all_reduce(xA)
        flat = y.view(-1, y.shape[-1])
        for outputs, ranks, B_RO in places:
            flat[:, outputs].addmm_(xA[:, ranks], B_RO)
        return given

    return forward


def _wrap_norm(module: Any, terms: Terms, scales: Scales) -> Forward:
    """x / rms(x) * (w + sum_p eta_p phi_p); with a residual, x is its sum with it, as vLLM's layer adds them."""
    columns = tuple(column for column, _ in terms)
    phi_PH = torch.stack([entry.dense() for _, entry in terms]).to(module.weight.device)
    if phi_PH.shape[1:] != module.weight.shape:
        raise InputError(f"a norm of {tuple(module.weight.shape)} is changed by {tuple(phi_PH.shape[1:])}")
    unit = twin(module, weight=torch.ones_like(module.weight))
    bare: Callable[[Tensor], Tensor] = RMSNorm.forward_native.__get__(unit)
    inner: Forward = type(module).forward.__get__(module)

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if not scales.active:
            return inner(x, residual)
        before = bare(x) if residual is None else None  # the layer may write into its input
        given = inner(x, residual)
        y, summed = given if isinstance(given, tuple) else (given, None)
        normed = bare(summed) if before is None else before
        change = scales.change(columns, phi_PH, y)
        y = y + normed * (change if y.dim() > 2 else change.squeeze(1))
        return y if summed is None else (y, summed)

    return forward

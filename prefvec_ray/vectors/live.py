"""A live model at any coefficients: theta = theta_base + sum_p eta_p phi_p, rewritten in place in one pass.

    vectors = {name: load_vector(f"vectors/{name}") for name in ("helpful", "harmless")}
    live = LiveModel(model, vectors)
    live.set_coefficients({"helpful": 0.7, "harmless": 1.0})
    live.model.generate(...)

Always from the pristine base, never on top of the last merge (100 incremental bf16 updates drift nine times
further than one fresh merge). Preference Vectors, arXiv 2504.20106, equation of section 3.2.
"""

import itertools
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.checkpoint import Checkpoint, checkpoint_state
from prefvec_ray.vectors.entries import Entry
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.fused import CODES, FusedMerge, Segment, flat_views, packed


class LiveModel:
    """A torch model whose parameters follow the coefficients of its preference vectors.

    The parameters become views of one flat buffer per dtype (a tied weight once). The base is kept beside
    them: as a second flat buffer of the parameters that change, or, where `base` is given, as those tensors
    themselves, under their checkpoint names. Memory-mapped tensors do (`base=Checkpoint(folder)`,
    `load_vector`): processes of one node then share one copy of base and vectors. Vectors stay in their
    stored dtype; on CUDA they are copied to the device.

    `base_fingerprint` skips hashing the model where the caller knows it, or where the model was loaded in
    another dtype than its folder's. `native=False` refuses the compiled kernel; the bits are the same.

    Raises InputError where a vector belongs to another base, or changes a parameter that the model has not,
    or not in that shape.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Mapping[str, PreferenceVector],
        *,
        base: Checkpoint | Mapping[str, Tensor] | None = None,
        base_fingerprint: str | None = None,
        threads: int | None = None,
        native: bool = True,
    ):
        self.model = model
        # fp32 sums depend on their order, so that must not come from the caller's dict.
        self.vectors = dict(sorted(vectors.items()))
        self.base_fingerprint = base_fingerprint or fingerprint(model)
        if isinstance(base, Checkpoint):
            base = {name: base.tensor(name) for name in base.names()}
        state = checkpoint_state(model)
        self._check(state, base)
        with torch.no_grad():
            _flatten(model)
            segments = self._segments(checkpoint_state(model), base)
        self._merge = FusedMerge(segments, threads=threads, native=native)
        self._coefficients = dict.fromkeys(self.vectors, 0.0)

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients that the weights now have, one for every vector."""
        return dict(self._coefficients)

    def set_coefficients(self, coefficients: Mapping[str, float]) -> None:
        """Rewrite the weights; vectors that are not named get 0. All 0 gives the base bit for bit.

        Nothing else may use the model meanwhile. Raises InputError for an unknown name, for NaN and
        infinity, and where a weight would overflow its dtype; in the last case the weights are the base's
        again.
        """
        eta = check_coefficients(coefficients, self.vectors)
        overflowed = self._merge.run(list(eta.values()))
        self._coefficients = eta
        if overflowed is not None:
            self._coefficients = dict.fromkeys(self.vectors, 0.0)
            self._merge.run(list(self._coefficients.values()))
            raise InputError(f"coefficients {eta} make '{overflowed}' infinite or NaN; choose smaller ones")

    def _check(self, state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        for key, vector in self.vectors.items():
            check_base(vector, self.base_fingerprint)
            for name in vector.names():
                if name not in state:
                    raise InputError(f"vector '{key}' changes '{name}', which the model does not have")
                tensor, shape = state[name], tuple(vector.shape(name))
                if tensor.shape != shape:
                    raise InputError(f"vector '{key}': '{name}' has shape {shape}, in the model {tuple(tensor.shape)}")
                if tensor.dtype not in CODES or tensor.untyped_storage().data_ptr() not in parameters:
                    raise InputError(f"'{name}' ({tensor.dtype}) is no parameter in fp32, bf16 or fp16; load it so")
                given = tensor if base is None else base.get(name)
                if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                    raise InputError(f"the base given does not hold '{name}' in the model's shape and dtype")

    def _segments(self, state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> list[Segment]:
        changed = sorted({name for vector in self.vectors.values() for name in vector.names()})
        changed.sort(key=lambda name: (str(state[name].dtype), state[name].data_ptr()))
        pristine = packed([state[name] for name in changed]) if base is None else [base[name] for name in changed]
        terms: dict[str, list[tuple[int, Entry]]] = {name: [] for name in changed}
        for k, vector in enumerate(self.vectors.values()):
            names = [name for name in changed if name in vector]
            for name, entry in zip(names, _on_device(vector, names, state), strict=True):
                terms[name].append((k, entry))
        return [
            Segment(name, state[name], before.to(state[name].device), tuple(terms[name]))
            for name, before in zip(changed, pristine, strict=True)
        ]


def check_coefficients(coefficients: Mapping[str, float], names: Mapping[str, object]) -> dict[str, float]:
    """One finite fp32 number for every name, 0 where none is given; InputError for unknown names and bad
    numbers."""
    for name, value in coefficients.items():
        if name not in names:
            raise InputError(f"unknown preference '{name}'; known: {', '.join(sorted(names)) or 'none'}")
        fine = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or abs(value) > float(np.finfo(np.float32).max):
            raise InputError(f"coefficient of '{name}' is {value!r}; expected a finite number")
    return {name: float(coefficients.get(name, 0.0)) for name in names}


def check_base(vector: PreferenceVector, base_fingerprint: str) -> None:
    """InputError unless the vector was taken on this base."""
    if vector.info.base_fingerprint != base_fingerprint:
        raise InputError(
            f"vector '{vector.info.preference}' belongs to base {vector.info.base_fingerprint[:23]}…,"
            f" this base is {base_fingerprint[:23]}…; use the base it was trained on"
        )


def _flatten(model: nn.Module) -> None:
    """Make the parameters views of one flat buffer per dtype. Weights that share memory go on sharing it."""
    shared: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        place = (parameter.device, parameter.data_ptr(), parameter.shape, parameter.dtype)
        shared.setdefault(place, []).append(parameter)
    views = flat_views([group[0] for group in shared.values()])
    for view, group in zip(views, shared.values(), strict=True):
        view.copy_(group[0])
        for parameter in group:  # one by one, so that old memory goes as new memory fills
            parameter.data = view


def _on_device(vector: PreferenceVector, names: list[str], state: Mapping[str, Tensor]) -> list[Entry]:
    """The entries as they are (mapped, shared) on CPU; elsewhere copied into one flat buffer per dtype."""
    entries = [vector.entry(name) for name in names]
    devices = [state[name].device for name in names]
    if all(device.type == "cpu" for device in devices):
        return entries
    parts = [list(entry.parts().values()) for entry in entries]
    placed = iter(
        packed(
            [tensor for group in parts for tensor in group],
            [device for group, device in zip(parts, devices, strict=True) for _ in group],
        )
    )
    return [type(entry)(*itertools.islice(placed, len(group))) for entry, group in zip(entries, parts, strict=True)]

"""Every row of a batch under its own coefficients: y = x W^T + sum_p eta_p[row] (x A_p^T) B_p^T, beside the weights.

    with Steering(model, {"helpful": helpful, "harmless": harmless}) as steering:
        steering.set_coefficients([{"helpful": 1.0}, {"harmless": 0.5}, {}])
        model.generate(**batch_of_three)

Nothing is rounded into the weights and nothing is rewritten between requests. (Punica, arXiv 2310.18547, and S-LoRA,
arXiv 2311.03285, batch adapters beside the weights; here every row uses every vector, with its own scales.)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.checkpoint import checkpoint_layout
from prefvec_ray.vectors.entries import Entry, LowRank, is_finite
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.forms import check_rank, shortened
from prefvec_ray.vectors.live import check_base, check_coefficients
from prefvec_ray.vectors.precision import StorageLoss
from prefvec_ray.vectors.sites import (
    Forward,
    Scales,
    SharedInput,
    is_embedding,
    is_linear,
    is_rounded,
    unit_norm,
    wrap_added,
    wrap_embedding,
    wrap_norm,
)

Coefficients: TypeAlias = Mapping[str, float] | Sequence[Mapping[str, float]] | Tensor
Place: TypeAlias = tuple[str, str]
"""(path of a module, name of its parameter)"""


class Steering:
    """Vectors attached to a `transformers` model; `detach()`, or leaving the `with` block, restores it exactly.

    Steered exactly: low-rank entries of linear layers, any entries of embeddings (tied heads need low rank), norms and
    biases. Full entries of linear layers need `rank` or `energy` (as in `to_low_rank`); `errors` then states by vector
    |phi - used| / |phi|. What cannot be steered (fused experts, routers) is an InputError by name: merge such
    vectors with `LiveModel`. So is another base, and a parameter that the model has not, or not in that shape.

    The model is run once on four tokens, to see which layers share an input and that each is reached at all. `names` is
    the order of coefficient columns: sorted. `base_fingerprint` skips hashing the model. It is needed for a base whose
    layers bitsandbytes has rounded, whose own numbers are others: give that of the base in full precision.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Mapping[str, PreferenceVector],
        *,
        rank: int | None = None,
        energy: float | None = None,
        base_fingerprint: str | None = None,
    ):
        if rank is not None or energy is not None:
            check_rank(rank, energy)
        self.model, self.names = model, tuple(sorted(vectors))
        self.base_fingerprint = base = base_fingerprint or fingerprint(model)
        self._modules = dict(model.named_modules())
        if any(getattr(module.__dict__.get("forward"), "steered", False) for module in self._modules.values()):
            raise InputError("the model is steered already; detach() that steering first")
        self.errors: dict[str, float] = {}
        sites = self._sites(vectors, base, rank, energy)
        inputs = self._inputs(sites)
        self._scales = Scales(torch.zeros(1, len(self.names)))
        self._before: dict[str, Any] = {}
        self._steered: dict[str, Forward] = {}
        try:
            self._attach(sites, inputs)
        except BaseException:
            self.detach()
            raise

    @property
    def coefficients(self) -> Tensor:
        """(n, P) in fp32: the rows now in force, columns as in `names`."""
        return self._scales.rows_NP.clone()

    def set_coefficients(self, coefficients: Coefficients) -> None:
        """For the next forward passes: one mapping for all rows, one mapping per row, or a tensor of `names` columns.

        A tensor has one row for all, one per batch row, or one per token of a packed batch (batch * tokens rows). Names
        that a mapping leaves out are 0. Raises InputError for unknown names, other shapes, NaN and infinity.
        """
        if not isinstance(coefficients, Tensor):
            known = dict.fromkeys(self.names)
            given = [coefficients] if isinstance(coefficients, Mapping) else list(coefficients)
            rows = [list(check_coefficients(row, known).values()) for row in given]
            coefficients = torch.tensor(rows, dtype=torch.float32).view(len(rows), len(self.names))
        if coefficients.dim() != 2 or coefficients.shape[1] != len(self.names) or not len(coefficients):
            expected = f"(rows, {len(self.names)}), columns {', '.join(self.names)}"
            raise InputError(f"coefficients of shape {tuple(coefficients.shape)}; expected {expected}")
        if not torch.isfinite(coefficients).all():
            raise InputError("a coefficient is NaN or infinite; expected finite numbers")
        self._scales.set(coefficients.detach().float().clone())

    def detach(self) -> None:
        """Give every layer its own forward back. May be called twice."""
        for path, before in self._before.items():
            if before is None:
                self._modules[path].__dict__.pop("forward", None)
            else:
                self._modules[path].forward = before
        self._before = {}

    def attach(self) -> None:
        """Undo a `detach()`. The model must not have been given another steering meanwhile, or have lost it again."""
        for path, steered in self._steered.items():
            self._before[path] = self._modules[path].__dict__.get("forward")
            self._modules[path].forward = steered

    def __enter__(self) -> "Steering":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _sites(
        self, vectors: Mapping[str, PreferenceVector], base: str, rank: int | None, energy: float | None
    ) -> dict[Place, list[tuple[int, Entry]]]:
        """Which modules' parameters change, and by what; full matrices are shortened on the way."""
        layout = checkpoint_layout(self.model)
        owners = {piece.name: (owner, piece.shape) for owner, pieces in layout.items() for piece in pieces}
        rounded = self._rounded()
        owners |= rounded
        places: dict[int, list[Place]] = {}
        for path, module in self._modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((path, name))
        sites: dict[Place, list[tuple[int, Entry]]] = {}
        for column, key in enumerate(self.names):
            loss = StorageLoss()
            check_base(vectors[key], base)
            for name in vectors[key].names():
                exact = vectors[key].entries[name]
                if name not in owners:
                    raise InputError(f"vector '{key}' changes '{name}', which the model does not have")
                owner, shape = owners[name]
                parameter = self.model.get_parameter(owner)
                if tuple(exact.shape) != shape:
                    raise InputError(f"vector '{key}': '{name}' has shape {tuple(exact.shape)}, in the model {shape}")
                if shape != tuple(parameter.shape) and name not in rounded:
                    raise InputError(f"vector '{key}': '{name}' is fused into '{owner}'; merge it with LiveModel")
                if not is_finite(exact):
                    raise InputError(f"vector '{key}': '{name}' holds NaN or infinity; extract it again")
                used = exact
                here = places[id(parameter)]
                if not isinstance(exact, LowRank) and any(is_linear(self._modules[path]) for path, _ in here):
                    if exact.shape[1:] and rank is None and energy is None:
                        raise InputError(
                            f"vector '{key}': '{name}' is in full form; give rank or energy, or use to_low_rank"
                        )
                    used = shortened(exact, rank=rank, energy=energy)
                loss.update(name, exact, used)
                for place in here:
                    sites.setdefault(place, []).append((column, used))
            self.errors[key] = loss.relative_error
        return sites

    def _rounded(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """The weights of rounded layers, which no checkpoint file holds: name -> itself, and the shape in full."""
        return {
            f"{path}.weight": (f"{path}.weight", (layer.out_features, layer.in_features))
            for path, layer in self._modules.items()
            if is_rounded(layer)
        }

    @torch.no_grad()
    def _inputs(self, sites: Mapping[Place, object]) -> dict[str, Tensor]:
        """Path -> what the module reads when the model runs on two rows of two tokens, in the order of the calls."""
        seen: dict[str, Tensor] = {}

        def noting(path: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, named: seen.update(
                {path: [*args, *named.values()][0]} if path not in seen else {}
            )

        paths = sorted({path for path, _ in sites})
        hooks = [self._modules[path].register_forward_pre_hook(noting(path), with_kwargs=True) for path in paths]
        device = next(self.model.parameters()).device
        try:
            self.model(input_ids=torch.zeros(2, 2, dtype=torch.long, device=device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for path in paths:
            if path not in seen:
                raise InputError(f"'{path}' was not reached when the model ran, so it cannot be steered; merge it")
            if seen[path].shape[0] % 2:
                raise InputError(f"'{path}' does not see the rows of the batch, so it cannot be steered; merge it")
        return seen

    def _attach(self, sites: Mapping[Place, list[tuple[int, Entry]]], inputs: Mapping[str, Tensor]) -> None:
        groups: dict[int, list[str]] = {}
        for path, x in inputs.items():
            if (path, "weight") in sites and is_linear(self._modules[path]):
                groups.setdefault(id(x), []).append(path)
        for group in groups.values():
            shared = SharedInput(self._scales, [sites[path, "weight"] for path in group], inputs[group[0]])
            for index, path in enumerate(group):
                self._install(path, partial(shared.wrap, index))
        for (path, which), terms in sites.items():
            module, device = self._modules[path], self._modules[path].get_parameter(which).device
            if is_embedding(module):
                self._install(path, partial(wrap_embedding, module, terms, self._scales))
            elif which == "bias" and (is_linear(module) or isinstance(module, nn.LayerNorm)):
                self._install(path, partial(wrap_added, terms, self._scales, device))
            elif not is_linear(module):
                unit = unit_norm(module, which)
                if unit is None:
                    kind = type(module).__name__
                    raise InputError(f"'{path}.{which}' of a {kind} cannot be steered; merge it with LiveModel")
                self._install(path, partial(wrap_norm, unit, terms, self._scales, device))

    def _install(self, path: str, wrap: Callable[[Forward], Forward]) -> None:
        module = self._modules[path]
        self._before.setdefault(path, module.__dict__.get("forward"))
        steered = wrap(module.forward)
        steered.steered = True  # type: ignore[attr-defined]
        module.forward = self._steered[path] = steered

"""What steering computes inside one layer: each function here wraps a module's forward with the vectors' share.

Rows are the first dimension of everything: row i of the coefficients belongs to the i-th of n equal consecutive parts
of the positions (batch x sequence) that a layer sees. So (batch, P) steers by request and (batch * tokens, P) by token.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors.entries import Entry, LowRank

Forward: TypeAlias = Callable[..., Any]
Terms: TypeAlias = Sequence[tuple[int, Entry]]
"""(column of the coefficients, what that vector changes)"""


class Scales:
    """The coefficients of the batch at hand, (n, P) in fp32, and what the layers need of them, made once per batch."""

    def __init__(self, rows: Tensor):
        self.set(rows)

    def set(self, rows: Tensor) -> None:
        self.rows_NP = rows
        # With every coefficient 0 the layers run untouched, so the base's outputs come out bit for bit.
        self.active = bool(rows.any())
        self._made: dict[Any, Tensor] = {}

    def columns(self, columns: tuple[int, ...], like: Tensor) -> Tensor:
        """(n, len(columns)), on the device and in the dtype of `like`. Layers with the same columns share it."""
        key = (columns, like.dtype, like.device)
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():  # so that any later mode may use it
                self._made[key] = self.rows_NP[:, list(columns)].to(like.dtype).to(like.device)
        return self._made[key]

    def change(self, columns: tuple[int, ...], phi_PH: Tensor, like: Tensor) -> Tensor:
        """sum_p eta_p phi_p for each of the n rows, (n, 1, H): summed in the dtype of phi, given in that of `like`."""
        key = (id(phi_PH), like.dtype)
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = (self.columns(columns, phi_PH) @ phi_PH).to(like.dtype).unsqueeze(1)
        return self._made[key]

    def multiply(self, values: Tensor, columns: tuple[int, ...], x: Tensor) -> None:
        """values *= coefficients, in place; values are (positions, len(columns)) computed from the input x."""
        scale = self.columns(columns, values)
        n = len(scale)
        if n == 1 or n == len(values):
            values.mul_(scale)
        else:
            self.parts(values, x).mul_(scale.unsqueeze(1))

    def parts(self, values: Tensor, x: Tensor) -> Tensor:
        """(..., width) as (n, positions / n, width): a view where values are contiguous."""
        n, flat = len(self.rows_NP), values.reshape(-1, values.shape[-1])
        # Where heads were moved before tokens, as for some norms of queries and keys, strides no longer fall.
        in_order = list(x.stride()) == sorted(x.stride(), reverse=True)
        by_token = x.dim() > 2 and in_order and x.shape[0] * x.shape[1] == n
        if x.shape[0] % n and not by_token:
            raise InputError(
                f"{n} rows of coefficients do not fit an input of shape {tuple(x.shape)};"
                " give one row, one per batch row, or one per token"
            )
        return flat.view(n, -1, flat.shape[-1])


class SharedInput:
    """Linear layers that read one input: A of all layers and vectors is one matrix, and x A^T is computed once.

    `x` is recognised by identity; a layer that is called with another tensor computes its own product.
    """

    def __init__(self, scales: Scales, members: Sequence[Terms], x: Tensor):
        """`x`: what the layers read, of any length; the factors take its dtype and device."""
        self._scales = scales
        factors = [entry.A_RI for terms in members for _, entry in terms if isinstance(entry, LowRank)]
        self._A_RI = torch.cat(factors).to(x)
        columns: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._B: list[Tensor] = []
        for terms in members:
            start = len(columns)
            for column, entry in terms:
                assert isinstance(entry, LowRank)
                columns += [column] * entry.rank
            self._ranges.append((start, len(columns)))
            B_RO = torch.cat([entry.B_OR.mT for _, entry in terms if isinstance(entry, LowRank)])
            self._B.append(B_RO.to(x).contiguous())
        self._columns = tuple(columns)
        self._x: Tensor | None = None
        self._xA: Tensor | None = None

    def wrap(self, index: int, inner: Forward) -> Forward:
        """The forward of member `index`; the last one lets go of the input."""
        (start, stop), B_RO, last = self._ranges[index], self._B[index], index == len(self._B) - 1
        scales = self._scales

        def forward(x: Tensor) -> Tensor:
            y = inner(x)
            if not scales.active:
                return y
            if self._x is not x:
                self._project(x)
            xA = self._xA
            assert xA is not None
            y.view(-1, y.shape[-1]).addmm_(xA[:, start:stop], B_RO)
            if last:
                self._x = self._xA = None
            return y

        return forward

    def _project(self, x: Tensor) -> None:
        xA = linear(x.reshape(-1, x.shape[-1]), self._A_RI)
        self._scales.multiply(xA, self._columns, x)
        self._x, self._xA = x, xA


def wrap_embedding(module: nn.Embedding, terms: Terms, scales: Scales, inner: Forward) -> Forward:
    """Low-rank: the rows of B that the tokens select, scaled, times A. Full: phi's own rows, scaled."""
    low_rank = [(column, entry) for column, entry in terms if isinstance(entry, LowRank)]
    lookups: list[tuple[nn.Module, tuple[int, ...], Tensor | None]] = []
    if low_rank:
        A_RD = torch.cat([entry.A_RI for _, entry in low_rank]).to(module.weight)
        B_VR = torch.cat([entry.B_OR for _, entry in low_rank], dim=1).to(module.weight)
        columns = tuple(column for column, entry in low_rank for _ in range(entry.rank))
        lookups.append((twin(module, weight=B_VR), columns, A_RD))
    for column, entry in terms:
        if not isinstance(entry, LowRank):
            table = twin(module, weight=entry.dense().to(module.weight))
            lookups.append((table, (column,) * module.embedding_dim, None))

    def forward(*args: Any, **named: Any) -> Tensor:
        y = inner(*args, **named)
        if scales.active:
            for table, columns, A_RD in lookups:
                part = table(*args, **named)
                scales.multiply(part.view(-1, part.shape[-1]), columns, part)
                y = y + (part if A_RD is None else part @ A_RD)
        return y

    return forward


def wrap_added(terms: Terms, scales: Scales, device: torch.device, inner: Forward) -> Forward:
    """Biases: sum_p eta_p phi_p is added to the output."""
    columns, phi_PO = _stacked(terms, device)

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if not scales.active:
            return y
        return (scales.parts(y, x) + scales.change(columns, phi_PO, y)).reshape(y.shape)

    return forward


def wrap_norm(unit: nn.Module, terms: Terms, scales: Scales, device: torch.device, inner: Forward) -> Forward:
    """Norms: y = f(x, w) is affine in w number by number, so f(x, w + phi) = f(x, w) + phi * f'(x).

    f' is `unit`, see `unit_norm`.
    """
    columns, phi_PH = _stacked(terms, device)

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if not scales.active:
            return y
        change = scales.parts(unit(x), x) * scales.change(columns, phi_PH, y)
        return (scales.parts(y, x) + change).reshape(y.shape)

    return forward


def _stacked(terms: Terms, device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    return tuple(column for column, _ in terms), torch.stack([entry.dense() for _, entry in terms]).to(device)


def twin(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The module with other parameters; everything else is shared."""
    other = copy.copy(module)
    fixed = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    other._parameters = {**module._parameters, **fixed}
    other.__dict__.pop("forward", None)
    return other


@torch.no_grad()
def unit_norm(module: nn.Module, which: str) -> nn.Module | None:
    """The norm with the weights (1, or 0 where it adds the 1 itself) that leave its bare normalised input.

    None where the module is not affine in its weight, number by number: that is tried out, not guessed from its name.
    """
    weight = module.get_parameter(which)
    if weight.dim() != 1 or list(module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x, phi = (torch.randn(3, len(weight), generator=generator).to(weight.device) for _ in range(2))
    others = {name: torch.zeros_like(p) for name, p in module.named_parameters() if name != which}
    exact = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    for value in (1.0, 0.0):
        try:
            nothing = twin(module, **others, **{which: torch.full_like(weight, value - 1)})(x.to(weight.dtype))
            unit = twin(module, **others, **{which: torch.full_like(weight, value)})
            bare = twin(
                module, **{k: p.float() for k, p in others.items()}, **{which: unit.get_parameter(which).float()}
            )
            before, after = (twin(module, **exact | {which: exact[which] + d})(x) for d in (0, phi[0]))
            affine = torch.allclose(after, before + phi[0] * bare(x), atol=1e-4, rtol=1e-4)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants other inputs: not a norm
            return None
        if not nothing.any() and affine:
            return unit
    return None


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or is_rounded(module))


def is_rounded(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer of bitsandbytes: its weight is rounded, and in 4 bits packed into another shape."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")

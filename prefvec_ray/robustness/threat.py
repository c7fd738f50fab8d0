"""The threat model: an L-infinity or L2 ball, perhaps inside a box of allowed values; and what may enter it.

Everything in this package works on a *classifier*: a `torch.nn.Module` that turns inputs of any shape (N, ...) into
logits (N, classes). Images, features and token embeddings differ in their ball alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError

Norm = Literal["linf", "l2"]
_BISECTIONS = 50


@dataclass(frozen=True)
class Ball:
    """All x' with low <= x' <= high and |x' - x| <= epsilon: in every coordinate (`linf`), or as the root of the sum of
    squares over all of a row's coordinates (`l2`).

    `low` and `high` are None together where inputs have no limits, as embeddings. Images live in [0, 1], the default.
    """

    epsilon: float
    low: float | None = 0.0
    high: float | None = 1.0
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise InputError(f"epsilon {self.epsilon!r}: expected a number, the radius of the ball in input units")
        if not math.isfinite(self.epsilon) or self.epsilon <= 0:
            raise InputError(f"epsilon {self.epsilon}: expected more than 0; at 0 there is nothing to attack")
        if (self.low is None) != (self.high is None):
            raise InputError(f"limits {self.low} to {self.high}: give both, or None for both")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise InputError(f"limits {self.low} to {self.high}: the lower must be below the upper")
        if self.norm not in get_args(Norm):
            raise InputError(f"norm {self.norm!r}: expected linf or l2")

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """A point of the ball around `x`, close to `moved`: first the nearest of the ball without its limits, then
        cut at the limits. In L-infinity that is the nearest point."""
        if self.norm == "l2":
            step = moved - x
            moved = x + step * (self.epsilon / _norms(step).clamp_min(self.epsilon))
        else:
            moved = torch.minimum(torch.maximum(moved, x - self.epsilon), x + self.epsilon)
        return moved if self.low is None else moved.clamp(self.low, self.high)

    def around(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A point of the ball, uniform before the limits are applied. `generator` lives on the CPU, so that a seed
        means the same on every device."""
        if self.norm == "l2":
            noise = torch.randn(x.shape, generator=generator)
            radius = torch.rand(len(x), generator=generator) ** (1 / x[0].numel())
            noise = noise / _norms(noise) * radius.reshape(-1, *[1] * (x.ndim - 1))
        else:
            noise = torch.rand(x.shape, generator=generator) * 2 - 1
        return self.project(x + self.epsilon * noise.to(x), x)

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length 1 in this norm that climbs most, for each row: the sign, or the normed gradient. 0 where
        the gradient is 0."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def gain(self, gradient: Tensor) -> Tensor:
        """How much a linear function of this gradient rises over `epsilon`, without limits, (N,): epsilon times the
        gradient's L1 (`linf`) or L2 norm (`l2`)."""
        return self.epsilon * gradient.flatten(1).norm(p=1 if self.norm == "linf" else 2, dim=1)

    def furthest(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The point of the ball inside its limits where a linear function of this gradient is largest.

        In L2 that is `x` plus a multiple of the gradient, cut at the limits: the multiple is found by bisection.
        """
        if self.norm == "linf":
            return self.project(torch.where(gradient > 0, torch.inf, -torch.inf), x)
        if self.low is None:
            return x + self.epsilon * self.direction(gradient)

        def reached(exponent: Tensor) -> Tensor:
            return (x + exponent.exp2() * self.direction(gradient)).clamp(self.low, self.high) - x

        low, high = _norms(x) * 0 - 40.0, _norms(x) * 0 + 40.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            inside = _norms(reached(middle)) <= self.epsilon
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return x + reached(low)


def _norms(x: Tensor) -> Tensor:
    """The L2 norm of every row, (N, 1, ...): it broadcasts over `x`."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def check_data(x: Tensor, y: Tensor, ball: Ball, classes: int) -> None:
    """Refuse inputs and labels that an attack or a training would take silently, or die from far below.

    Raises:
        InputError: not (N, ...) floats with N integer labels; NaN or infinity; values outside the ball's limits; a
        label outside [0, classes); fewer
            than two classes in the classifier or in the labels.
    """
    _check_inputs(x)
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(f"labels of shape {tuple(y.shape)}, {y.dtype}: expected {len(x)} integers, one an input")
    if not x.isfinite().all():
        bad = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
        raise InputError(f"input {bad} holds NaN or infinity; leave it out or correct it")
    if ball.low is not None and ball.high is not None:
        smallest, largest = float(x.min()), float(x.max())
        if smallest < ball.low or largest > ball.high:
            found = f"inputs lie in [{smallest:g}, {largest:g}], the limits are [{ball.low:g}, {ball.high:g}]"
            raise InputError(f"{found}; scale the inputs (images of 0 to 255: divide by 255) or state other limits")
    if classes < 2:
        raise InputError(f"the classifier gives {classes} logit: expected two or more (two for yes and no)")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InputError(f"label {wrong} is out of range: the classifier knows 0 to {classes - 1}")
    if low == high:
        raise InputError(f"all labels are {low}: a single class cannot be classified; give inputs of two or more")


def _check_inputs(x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise InputError(f"inputs of shape {tuple(x.shape)}, {x.dtype}: expected floats of shape (N, ...)")
    if len(x) == 0:
        raise InputError("no inputs: expected at least two, of different classes")


def count_classes(model: nn.Module, x: Tensor) -> int:
    """The number of logits that `model` gives for the inputs `x`; InputError where these are no inputs at all."""
    _check_inputs(x)
    with attacked(model), torch.no_grad():
        logits = model(x[:1])
    if logits.ndim != 2:
        raise InputError(f"the classifier gives shape {tuple(logits.shape)} for one input: expected (1, classes)")
    return logits.shape[1]


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """The model as an attacker sees it: in evaluation mode, its parameters fixed. Every flag is as before
    afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, batch: int = 512) -> Tensor:
    """Which inputs the model, in evaluation mode, gives their label: (N,) bool. A NaN logit counts as wrong."""
    with attacked(model):
        answers = [_right(model(x[i : i + batch]), y[i : i + batch]) for i in range(0, len(x), batch)]
    return torch.cat(answers) if answers else torch.zeros(0, dtype=torch.bool, device=x.device)


def _right(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y) & logits.isfinite().all(1)

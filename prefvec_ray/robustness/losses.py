"""TRADES (Zhang et al., arXiv 1901.08573), plain adversarial training (Madry et al., arXiv 1706.06083) and PGD."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness.threat import Ball, attacked, correct

Objective = Callable[[Tensor], Tensor]
"""Inputs (N, ...) to what an attacker wants large, (N,)."""


@dataclass(frozen=True)
class Loss:
    """What a training step minimizes, a scalar with its graph, and what it consists of."""

    total: Tensor
    natural: float
    robust: float
    """The inner maximum: the mean KL (TRADES, not weighted) or cross-entropy (adversarial training) at the end of
    it."""


def kl_rows(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each row, (N,).

    Both sides stay logarithms: with probabilities as the target, one that underflows to 0 makes the gradient towards
    `reference` NaN.
    """
    return F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True).sum(1)


def cross_entropy_of(model: nn.Module, y: Tensor) -> Objective:
    """PGD's objective."""
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


def divergence_of(model: nn.Module, x: Tensor) -> Objective:
    """TRADES' objective: how far the answer moves from the one at `x`."""
    with torch.no_grad():
        reference = model(x)
    return lambda moved: kl_rows(model(moved), reference)


def ascend(
    objective: Objective, start: Tensor, x: Tensor, ball: Ball, *, steps: int, step_size: float
) -> tuple[Tensor, list[Tensor]]:
    """`steps` gradient steps from `start`, each projected into the ball around `x`.

    Returns the last point and the gradient at every point that a step started from. `step_size` is in input units: the
    length of a step in the ball's norm.
    """
    gradients, moved = [], start
    for _ in range(steps):
        gradients.append(gradient_of(objective, moved))
        moved = ball.project(moved + step_size * ball.direction(gradients[-1]), x)
    return moved, gradients


def gradient_of(objective: Objective, x: Tensor) -> Tensor:
    """The gradient of every row's objective towards that row."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        total = objective(x).sum()
    return torch.autograd.grad(total, x)[0]


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    restarts: int = 1,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """PGD on the cross-entropy: an attacked copy of `x`, the last iterate of each of `restarts` uniform starts.

    An input that one restart has turned is left alone by the next. `step_size` is in input units; there is no
    default, since PGD-10 with a small one is a weaker attack under the same name.
    """
    if steps < 1 or restarts < 1 or not step_size > 0:
        raise InputError(f"PGD of {steps} steps of {step_size}, {restarts} starts: all three must be above 0")
    generator = torch.Generator().manual_seed(seed)
    found = x.clone()
    with attacked(model):
        for i in range(0, len(x), batch):
            rows = torch.arange(i, min(i + batch, len(x)), device=x.device)
            for _ in range(restarts):
                part, labels = x[rows], y[rows]
                moved, _ = ascend(
                    cross_entropy_of(model, labels), ball.around(part, generator), part, ball,
                    steps=steps, step_size=step_size,
                )  # fmt: skip
                found[rows] = moved
                rows = rows[correct(model, moved, labels)]
                if not len(rows):
                    break
    return found


def trades_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    beta: float,
    generator: torch.Generator,
    steps: int = 10,
    step_size: float | None = None,
) -> Loss:
    """TRADES: cross-entropy at x plus `beta` times the largest KL in the ball (arXiv 1901.08573; beta is its 1/lambda).

    The inner maximum is sought with the model in evaluation mode, from Gaussian noise of 0.001, as the authors' code
    does; the model is left in its own mode. `x` may carry a graph (embeddings): then the gradient reaches it through
    both terms. `step_size` defaults to a quarter of epsilon.
    """
    if not beta > 0:
        raise InputError(f"beta {beta}: TRADES weighs its robust term with more than 0")
    fixed = x.detach()
    near = ball.project(fixed + 1e-3 * torch.randn(fixed.shape, generator=generator).to(fixed), fixed)
    moved = _worst(model, x, ball, near, lambda: divergence_of(model, fixed), steps, step_size)
    logits = model(x)
    robust = kl_rows(model(moved), logits).mean()
    natural = F.cross_entropy(logits, y)
    return Loss(natural + beta * robust, float(natural.detach()), float(robust.detach()))


def adversarial_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    generator: torch.Generator,
    steps: int = 10,
    step_size: float | None = None,
) -> Loss:
    """Plain adversarial training: the cross-entropy at the end of PGD from a uniform start (arXiv 1706.06083,
    equation 2.1)."""
    start = ball.around(x.detach(), generator)
    moved = _worst(model, x, ball, start, lambda: cross_entropy_of(model, y), steps, step_size)
    robust = F.cross_entropy(model(moved), y)
    return Loss(robust, float("nan"), float(robust.detach()))


def _worst(
    model: nn.Module,
    x: Tensor,
    ball: Ball,
    start: Tensor,
    objective: Callable[[], Objective],
    steps: int,
    step_size: float | None,
) -> Tensor:
    """`x`, with its graph, moved to where PGD from `start` finds the objective largest with the model in evaluation
    mode."""
    fixed = x.detach()
    size = ball.epsilon / 4 if step_size is None else step_size
    with attacked(model):
        moved, _ = ascend(objective(), start, fixed, ball, steps=steps, step_size=size)
    return x + (moved - fixed)

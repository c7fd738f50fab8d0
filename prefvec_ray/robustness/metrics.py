"""How well the inner maximization has converged: FOSC, SGCS and the maximum itself.

FOSC is from "On the Convergence and Robustness of Adversarial Training" (Wang et al., ICML 2019), SGCS from
"Adversarial Robustness Overestimation and Instability in TRADES" (arXiv 2410.07675).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefvec_ray.robustness.losses import ascend, cross_entropy_of, gradient_of
from prefvec_ray.robustness.threat import Ball, attacked


def fosc(gradient: Tensor, moved: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """First-Order Stationary Condition of each row, (N,): max over the epsilon-ball of <x' - moved, gradient>, which is
    epsilon |gradient|_1 - <moved - x, gradient> in L-infinity, and the same with the L2 norm in L2.

    0 where `moved` is stationary: no gradient, or a corner of the ball that the gradient points to. The published
    form ignores the limits of the box; see `fosc_within`. In units of the objective, so it grows with the scale of
    the logits.
    """
    flat = gradient.flatten(1)
    return ball.gain(gradient) - (flat * (moved - x).flatten(1)).sum(1)


def fosc_within(gradient: Tensor, moved: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """FOSC over what may really be reached, the ball inside its limits: a pixel that stands at 0 and is pulled below
    counts as stationary.

    Equal to `fosc` where no limit cuts the ball.
    """
    return (gradient * (ball.furthest(gradient, x) - moved)).flatten(1).sum(1)


def relative(condition: Tensor, gradient: Tensor, ball: Ball) -> Tensor:
    """A FOSC in units of `ball.gain`, epsilon |gradient|_1 in L-infinity: comparable across betas, losses and spaces.
    From 0, stationary, to 2; about 1 where an attack gained nothing from the gradient; 0 where there is no gradient."""
    size = ball.gain(gradient)
    return torch.where(size > 0, condition / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))


def sgcs(gradients: Sequence[Tensor]) -> Tensor:
    """Step-wise gradient cosine similarity of each row, (N,): the mean cosine between the gradients of successive
    steps of one ascent.

    1: the loss is linear along the path. Near 0 or below: every step finds another landscape. A zero gradient counts
    as 0.
    """
    rows = [gradient.flatten(1) for gradient in gradients]
    pairs = [F.cosine_similarity(a, b, dim=1) for a, b in itertools.pairwise(rows)]
    return torch.stack(pairs).mean(0) if pairs else torch.ones(len(rows[0]))


@dataclass(frozen=True)
class Probe:
    """Means over the rows, at the end of one PGD on the cross-entropy."""

    fosc: float
    fosc_relative: float
    fosc_within: float
    """Relative, and over what the limits leave of the ball."""
    sgcs: float
    inner_gain: float
    """How much the cross-entropy rose from the clean input, in nats."""


def probe(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> Probe:
    """Measure the model's inner maximization on `x` with PGD (`step_size` defaults to a quarter of epsilon).

    The cross-entropy is probed whatever the training maximizes, so that methods can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    with attacked(model):
        objective = cross_entropy_of(model, y)
        moved, gradients = ascend(
            objective, ball.around(x, generator), x, ball, steps=steps, step_size=step_size or ball.epsilon / 4
        )
        last = gradient_of(objective, moved)
        with torch.no_grad():
            gain = objective(moved) - objective(x)
    raw, within = fosc(last, moved, x, ball), fosc_within(last, moved, x, ball)
    return Probe(
        fosc=float(raw.mean()),
        fosc_relative=float(relative(raw, last, ball).mean()),
        fosc_within=float(relative(within, last, ball).mean()),
        sgcs=float(sgcs([*gradients, last]).mean()),
        inner_gain=float(gain.mean()),
    )

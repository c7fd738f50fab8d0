"""Training one classifier robustly, with the curves that show what its gradients were worth on the way."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.robustness.attacks import TARGETED_CLASSES, strong_attack
from prefvec_ray.robustness.intervals import Gap
from prefvec_ray.robustness.losses import Loss, adversarial_loss, pgd, trades_loss
from prefvec_ray.robustness.metrics import probe
from prefvec_ray.robustness.threat import Ball, check_data, correct, count_classes

Method = Literal["trades", "adversarial"]


class Remedy(Config):
    """Gaussian noise on the inputs of the next epoch whenever the watched FOSC is above `threshold`; it stops by
    itself when FOSC is not (arXiv 2410.07675, section on the solution). FOSC is raw, in nats, as there."""

    threshold: float = Field(default=0.6, ge=0)
    sigma: float = Field(default=0.2, gt=0)


class Recipe(Config):
    """How one run trains."""

    method: Method = "trades"
    epsilon: float
    beta: float = Field(default=6.0, gt=0)
    """Weight of TRADES' robust term; plain adversarial training has none."""
    lr: float = Field(default=0.1, gt=0)
    batch: int = Field(default=32, ge=2)
    epochs: int = Field(default=20, ge=1)
    inner_steps: int = Field(default=10, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    drops: tuple[float, ...] = ()
    """The learning rate falls to a tenth at these shares of the epochs."""
    augment: bool = False
    """Shift images by up to four pixels and mirror half of them, as CIFAR is trained."""
    remedy: Remedy | None = None
    watch_every: int = Field(default=2, ge=1)
    """Epochs between two measurements of the gap."""


class Moment(Config):
    """One epoch, measured on the watched images."""

    epoch: int
    natural: float | None
    inner_max: float
    fosc: float
    fosc_relative: float
    fosc_within: float
    sgcs: float
    noise: bool
    clean: float
    pgd: float | None = None
    strong: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None

    @property
    def gap(self) -> float | None:
        return None if self.pgd is None or self.strong is None else self.pgd - self.strong


def robust_loss(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, recipe: Recipe, generator: torch.Generator) -> Loss:
    """The loss that the recipe asks for; see `trades_loss` and `adversarial_loss`."""
    if recipe.method == "trades":
        return trades_loss(model, x, y, ball, beta=recipe.beta, steps=recipe.inner_steps, generator=generator)
    return adversarial_loss(model, x, y, ball, steps=recipe.inner_steps, generator=generator)


def train_classifier(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    watch: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    ball: Ball | None = None,
    seed: int = 0,
    progress: Callable[[Moment], None] | None = None,
) -> list[Moment]:
    """Train `model` in place by SGD on `train`; measure every epoch on `watch`. `ball` defaults to images in [0, 1].

    The gap of a moment is PGD-10 minus a short strong attack (targeted APGD, then Square), a cheap estimate of what the
    audit measures at the end.

    Raises:
        InputError: as `check_data`, for either part.
        JobError: the loss is no number: the run diverged.
    """
    ball = ball or Ball(recipe.epsilon)
    if ball.epsilon != recipe.epsilon:
        raise InputError(f"the ball's epsilon is {ball.epsilon}, the recipe's {recipe.epsilon}; give the same")
    x, y = train
    classes = count_classes(model, x)
    check_data(x, y, ball, classes)
    check_data(*watch, ball, classes)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    milestones = [round(share * recipe.epochs) for share in recipe.drops]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    curve: list[Moment] = []
    noisy = False
    for epoch in range(1, recipe.epochs + 1):
        losses = _epoch(model, x, y, ball, recipe, optimizer, generator, noisy=noisy)
        if not math.isfinite(losses[1]):
            raise JobError(
                f"the loss is {losses[1]} in epoch {epoch}: the run diverged; lower the learning rate {recipe.lr}"
            )
        schedule.step()
        gap = epoch % recipe.watch_every == 0 or epoch == recipe.epochs
        curve.append(_watched(model, *watch, ball, classes, epoch, losses, noisy, gap=gap, seed=seed))
        noisy = recipe.remedy is not None and curve[-1].fosc > recipe.remedy.threshold
        if progress:
            progress(curve[-1])
    return curve


def _epoch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    *,
    noisy: bool,
) -> tuple[float, float]:
    """One pass over `x` in random order; the means of the natural and of the robust loss over its batches."""
    model.train()
    losses = []
    order = torch.randperm(len(x), generator=generator)
    # A rest of one input would leave batch normalization without a variance.
    for rows in [part for part in order.split(recipe.batch) if len(part) > 1]:
        part = _moved(x[rows], generator) if recipe.augment else x[rows]
        if noisy and recipe.remedy:
            noise = torch.randn(part.shape, generator=generator).to(part)
            part = part + recipe.remedy.sigma * noise
            part = part if ball.low is None else part.clamp(ball.low, ball.high)
        loss = robust_loss(model, part, y[rows], ball, recipe, generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append((loss.natural, loss.robust))
    natural, robust = (sum(values) / len(losses) for values in zip(*losses, strict=True))
    return natural, robust


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each shifted by up to four pixels into black, half of them mirrored."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    mirrored = torch.rand(n, generator=generator) < 0.5
    shifts = torch.randint(0, 9, (n, 2), generator=generator).tolist()
    parts = [image[:, a : a + height, b : b + width] for image, (a, b) in zip(padded, shifts, strict=True)]
    return torch.stack([part.flip(2) if flip else part for part, flip in zip(parts, mirrored, strict=True)])


def _watched(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    classes: int,
    epoch: int,
    losses: tuple[float, float],
    noise: bool,
    *,
    gap: bool,
    seed: int,
) -> Moment:
    """The model on the watched images after an epoch; with `gap`, also under the two attacks."""
    measured = probe(model, x, y, ball, seed=seed)
    right = correct(model, x, y)
    moment = Moment(
        epoch=epoch,
        natural=losses[0] if math.isfinite(losses[0]) else None,
        inner_max=losses[1],
        fosc=measured.fosc,
        fosc_relative=measured.fosc_relative,
        fosc_within=measured.fosc_within,
        sgcs=measured.sgcs,
        noise=noise,
        clean=float(right.float().mean()),
    )
    if not gap:
        return moment
    stands = correct(model, pgd(model, x, y, ball, steps=10, step_size=ball.epsilon / 4, seed=seed), y) & right
    left = stands.clone()
    steps = 10 if classes >= TARGETED_CLASSES else 20
    for name, count in (("apgd-t", steps), ("square", 100)):
        rows = left.nonzero().flatten()
        moved = strong_attack(name, model, x[rows], y[rows], ball, classes=classes, steps=count, seed=seed)  # type: ignore[arg-type]
        left[rows] = correct(model, moved, y[rows]) if len(rows) else left[rows]
    difference = Gap.paired("gap", stands, left)
    return moment.model_copy(
        update={
            "pgd": float(stands.float().mean()),
            "strong": float(left.float().mean()),
            "gap_low": difference.low,
            "gap_high": difference.high,
        }
    )


def healed(curve: list[Moment], tolerance: float = 0.05) -> bool:
    """Whether the run healed by itself: robustness was overestimated at some epoch (the interval of the gap above
    `tolerance`), is not at the last, and the strong accuracy has not fallen meanwhile."""
    seen = [moment for moment in curve if moment.gap is not None]
    bad = [moment for moment in seen if (moment.gap_low or 0) > tolerance]
    if not bad or not seen or (seen[-1].gap_low or 0) > tolerance:
        return False
    worst = max(bad, key=lambda moment: moment.gap or 0)
    return (seen[-1].strong or 0) >= (worst.strong or 0)

"""Training one classifier robustly, with the curves that show what its gradients were worth on the way."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import parse_model, taking_apart
from prefvec_ray.robustness.attacks import TARGETED_CLASSES, strong_attack
from prefvec_ray.robustness.intervals import Gap
from prefvec_ray.robustness.losses import Loss, adversarial_loss, pgd, trades_loss
from prefvec_ray.robustness.metrics import probe
from prefvec_ray.robustness.run_files import Pause, RunFiles
from prefvec_ray.robustness.threat import Ball, Norm, check_data, correct, count_classes

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
    norm: Norm = "linf"
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
    files: RunFiles | None = None,
) -> list[Moment]:
    """Train `model` in place by SGD on `train`; measure every epoch on `watch`. `ball` defaults to images in [0, 1].

    The gap of a moment is PGD-10 minus a short strong attack (targeted APGD, then Square), a cheap estimate of what the
    audit measures at the end.

    With `files`, the training continues from what is stored there, stores itself after each epoch, and stops after
    the first batch that ends past the budget. On a CPU, a training in slices ends in the same bits as one at a stretch.

    Raises:
        InputError: as `check_data`, for either part; or the stored training is damaged or of another recipe.
        JobError: the loss is no number: the run diverged.
        Pause: the budget is spent.
    """
    ball = ball or Ball(recipe.epsilon, norm=recipe.norm)
    if (ball.epsilon, ball.norm) != (recipe.epsilon, recipe.norm):
        raise InputError(
            f"the ball's epsilon is {ball.epsilon} ({ball.norm}), the recipe's {recipe.epsilon} ({recipe.norm}); "
            "give the same"
        )
    classes = count_classes(model, train[0])
    for part in (train, watch):
        check_data(*part, ball, classes)
    run = _Training(model, recipe, ball, seed, files)
    while run.epoch <= recipe.epochs:
        losses = run.finish_epoch(*train)
        if not math.isfinite(losses[1]):
            raise JobError(
                f"the loss is {losses[1]} in epoch {run.epoch}: the run diverged; lower the learning rate {recipe.lr}"
            )
        gap = run.epoch % recipe.watch_every == 0 or run.epoch == recipe.epochs
        moment = _watched(model, *watch, ball, classes, run.epoch, losses, run.noisy, gap=gap, seed=seed)
        run.next_epoch(moment)
        if progress:
            progress(moment)
        if files:
            files.pause_if_spent(f"epoch {moment.epoch} of {recipe.epochs} done")
    return run.curve


class _Words(Config):
    """What a stored training knows beside its tensors."""

    recipe: Recipe
    seed: int
    epoch: int
    noisy: bool
    curve: tuple[Moment, ...]


class _Training:
    """A model under way: all that the next batch depends on."""

    def __init__(self, model: nn.Module, recipe: Recipe, ball: Ball, seed: int, files: RunFiles | None) -> None:
        self.model, self.recipe, self.ball, self.seed, self.files = model, recipe, ball, seed, files
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.epoch, self.noisy = 1, False
        self.curve: list[Moment] = []
        self.order = torch.zeros(0, dtype=torch.long)
        """The order of the images in the epoch under way; empty between two epochs."""
        self.losses: list[tuple[float, float]] = []
        """Natural and robust loss of every batch of the epoch under way."""
        if files:
            self._load(files)

    def finish_epoch(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The rest of one pass over `x` in random order; the means of the two losses over all its batches."""
        recipe = self.recipe
        drops = sum(self.epoch > round(share * recipe.epochs) for share in recipe.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * 0.1**drops
        if not len(self.order):
            self.order = torch.randperm(len(x), generator=self.generator)
        # A rest of one input would leave batch normalization without a variance.
        batches = [part for part in self.order.split(recipe.batch) if len(part) > 1]
        for rows in batches[len(self.losses) :]:
            self._step(x[rows], y[rows])
            if self.files and self.files.budget.spent and len(self.losses) < len(batches):
                self._save(self.files)
                raise Pause(f"epoch {self.epoch} of {recipe.epochs}, batch {len(self.losses)} of {len(batches)}")
        natural, robust = (sum(values) / len(batches) for values in zip(*self.losses, strict=True))
        return natural, robust

    def next_epoch(self, moment: Moment) -> None:
        """Close the epoch that `moment` tells of."""
        self.curve.append(moment)
        self.noisy = self.recipe.remedy is not None and moment.fosc > self.recipe.remedy.threshold
        self.epoch, self.order, self.losses = self.epoch + 1, self.order[:0], []
        if self.files:
            self._save(self.files)

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        part = shifted(x, self.generator) if self.recipe.augment else x
        if self.noisy and self.recipe.remedy:
            noise = torch.randn(part.shape, generator=self.generator).to(part)
            part = part + self.recipe.remedy.sigma * noise
            part = part if self.ball.low is None else part.clamp(self.ball.low, self.ball.high)
        loss = robust_loss(self.model, part, y, self.ball, self.recipe, self.generator)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.optimizer.step()
        self.losses.append((loss.natural, loss.robust))

    def _momentum(self) -> dict[str, Tensor]:
        """The optimizer's buffers, by the parameters' names; made where there are none yet."""
        if not self.recipe.momentum:
            return {}
        named = dict(self.model.named_parameters())
        return {
            name: self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            for name, parameter in named.items()
        }

    def _save(self, files: RunFiles) -> None:
        files.save(
            STORED,
            {
                **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
                **{f"momentum.{name}": tensor for name, tensor in self._momentum().items()},
                "generator": self.generator.get_state(),
                "order": self.order,
                "losses": torch.tensor(self.losses, dtype=torch.float64),
            },
            _Words(
                recipe=self.recipe, seed=self.seed, epoch=self.epoch, noisy=self.noisy, curve=tuple(self.curve)
            ).model_dump_json(),
        )

    def _load(self, files: RunFiles) -> None:
        stored = files.load(STORED)
        if stored is None:
            return
        tensors, text = stored
        where, advice = f"checkpoint {files.folder}", "delete it, and its run begins anew"
        words = parse_model(text.encode(), _Words, where, advice)
        if (words.recipe, words.seed) != (self.recipe, self.seed):
            raise InputError(f"{where}: of another recipe or seed; {advice}")
        with taking_apart(where, advice), _naming_torch_errors(where, advice):
            weights = {key[len("model.") :]: value for key, value in tensors.items() if key.startswith("model.")}
            self.model.load_state_dict(weights)
            for name, buffer in self._momentum().items():
                buffer.copy_(tensors[f"momentum.{name}"])
            self.generator.set_state(tensors["generator"])
            self.order = tensors["order"]
            self.losses = [(natural, robust) for natural, robust in tensors["losses"].reshape(-1, 2).tolist()]
        self.epoch, self.noisy, self.curve = words.epoch, words.noisy, list(words.curve)


@contextmanager
def _naming_torch_errors(where: str, advice: str) -> Iterator[None]:
    """Torch reports tensors of other names, shapes or states by RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: of another model, or damaged ({reason}); {advice}") from error


STORED = "training"
"""The name of the training among the files of a run."""


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each shifted by up to four pixels into black, half of them mirrored. The draws are made on
    the CPU, so that a seed means the same everywhere; the images stay on their device."""
    n, _, height, width = images.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    down, right = torch.randint(0, 9, (n, 2), generator=generator).unbind(1)
    rows = down.unsqueeze(1) + torch.arange(height)
    columns = torch.arange(width).expand(n, -1)
    columns = right.unsqueeze(1) + torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
    padded = nn.functional.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    index = [part.to(images.device) for part in (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :])]
    return padded[index[0], index[1], index[2]].permute(0, 3, 1, 2).contiguous()


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

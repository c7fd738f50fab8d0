"""The audit: a ladder of attacks that separates a weak attack from masked gradients, and the card with its findings.

    PGD-10  ->  PGD-100 with restarts  ->  black box alone  ->  full ensemble (APGD, targeted APGD, FAB)

Where PGD-100 closes the gap, PGD-10 was weak. Where an attack without gradients beats PGD-100 with restarts, the
gradients are masked.
"""

import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prefvec_ray.common.config import Config
from prefvec_ray.robustness.attacks import Attack, strong_attack
from prefvec_ray.robustness.intervals import Gap, Rate
from prefvec_ray.robustness.losses import pgd
from prefvec_ray.robustness.metrics import probe
from prefvec_ray.robustness.suspicion import warnings_of
from prefvec_ray.robustness.threat import Ball, Norm, check_data, correct, count_classes
from prefvec_ray.robustness.words import WordAudit

Verdict = Literal["pass", "fail", "inconclusive"]
Finding = Literal["sound", "masked gradients", "weak attack", "overestimated", "not robust", "undecided"]
FORMAT = 1


class Ladder(Config):
    """How hard each rung attacks, and what the verdict tolerates. Step sizes are shares of epsilon."""

    pgd_steps: int = Field(default=10, ge=1)
    pgd_step_size: float = Field(default=0.25, gt=0)
    strong_steps: int = Field(default=100, ge=1)
    strong_step_size: float = Field(default=0.1, gt=0)
    restarts: int = Field(default=5, ge=1)
    apgd_steps: int = Field(default=50, ge=1)
    fab_steps: int = Field(default=10, ge=1)
    square_queries: int = Field(default=1000, ge=1)
    batch: int = Field(default=256, ge=1)
    tolerance: float = Field(default=0.05, ge=0, lt=1)
    """PGD may be above the ensemble by so much."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """The ensemble must leave at least so much; None: any honest figure passes."""

    @property
    def weak(self) -> str:
        """The first rung in words."""
        return f"PGD-{self.pgd_steps}"

    @property
    def strong(self) -> str:
        """The second rung in words."""
        return f"PGD-{self.strong_steps} with {self.restarts} {'start' if self.restarts == 1 else 'starts'}"


LADDERS = {"short": Ladder(), "standard": Ladder(apgd_steps=100, fab_steps=100, square_queries=5000)}
"""`standard` has AutoAttack's budget (arXiv 2003.01690): 100 steps of APGD, of targeted APGD and of FAB, 5,000 queries
of Square; many times as long as `short`."""


class Audit(Config):
    """What the ladder found. Written as JSON it is the audit card; `words` is filled in for scorers of text."""

    format: int = FORMAT
    verdict: Verdict
    finding: Finding
    reason: str
    created: str
    model_digest: str = ""
    space: str
    epsilon: float
    norm: Norm = "linf"
    clean: Rate
    rungs: tuple[Rate, ...]
    gaps: tuple[Gap, ...]
    """Paired, over the same inputs: `pgd - ensemble`, `pgd - pgd restarts`, `pgd restarts - black box`."""
    probe: dict[str, float]
    warnings: tuple[str, ...] = ()
    """What makes attacks of this kind unreliable on this model; see `warnings_of`. They change no verdict."""
    words: WordAudit | None = None
    curve: tuple[dict[str, float], ...] = ()
    """FOSC, SGCS and the inner maximum after each epoch of a scorer's training, on 128 of its texts."""
    ladder: Ladder
    seed: int
    seconds: float

    def rung(self, name: str) -> Rate:
        return next(rate for rate in (self.clean, *self.rungs) if rate.name == name)

    def gap(self, name: str) -> Gap:
        return next(gap for gap in self.gaps if gap.name == name)


CLEAN, PGD, STRONG, BLACK_BOX, ENSEMBLE = "clean", "pgd", "pgd restarts", "black box", "ensemble"
OVERESTIMATE, WEAKNESS, MASKING = "pgd - ensemble", "pgd - pgd restarts", "pgd restarts - black box"


def run_attacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    ladder: Ladder,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rungs: MutableMapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Which inputs stand on each rung: name -> (N,) bool.

    PGD-100 takes what PGD-10 left, the black box (Square) takes all that is right without an attack, and the ensemble
    is the worst of everything: the rungs before, then APGD-CE, targeted APGD and FAB, each on what the former left.

    What `rungs` holds is not attacked again, and each rung is put there as soon as it is done.
    """
    classes = count_classes(model, x)
    check_data(x, y, ball, classes)
    standing = {} if rungs is None else rungs

    def white(steps: int, step_size: float, restarts: int) -> _Move:
        size = step_size * ball.epsilon
        return lambda a, b: pgd(
            model, a, b, ball, steps=steps, step_size=size, restarts=restarts, seed=seed, batch=ladder.batch
        )

    def strong(name: Attack, steps: int) -> _Move:
        return lambda a, b: strong_attack(
            name, model, a, b, ball, classes=classes, steps=steps, seed=seed, batch=ladder.batch
        )

    plan: list[tuple[str, tuple[str, ...], _Move]] = [
        (CLEAN, (), lambda a, b: a),
        (PGD, (CLEAN,), white(ladder.pgd_steps, ladder.pgd_step_size, 1)),
        (STRONG, (PGD,), white(ladder.strong_steps, ladder.strong_step_size, ladder.restarts)),
        (BLACK_BOX, (CLEAN,), strong("square", ladder.square_queries)),
        ("apgd-ce", (STRONG, BLACK_BOX), strong("apgd-ce", ladder.apgd_steps)),
        ("apgd-t", ("apgd-ce",), strong("apgd-t", ladder.apgd_steps)),
        (ENSEMBLE, ("apgd-t",), strong("fab", ladder.fab_steps)),
    ]
    for done, (name, before, move) in enumerate(plan, start=1):
        if name not in standing:
            left = torch.ones(len(x), dtype=torch.bool, device=x.device)
            for other in before:
                left = left & standing[other]
            rows = left.nonzero().flatten()
            if len(rows):
                left[rows] = correct(model, move(x[rows], y[rows]), y[rows], ladder.batch)
            standing[name] = left
        if progress:
            progress(done, len(plan))
    return {name: standing[name] for name in (CLEAN, PGD, STRONG, BLACK_BOX, ENSEMBLE)}


_Move = Callable[[Tensor, Tensor], Tensor]
"""Inputs and labels to attacked inputs."""


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    ladder: Ladder | None = None,
    *,
    space: str = "inputs",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rungs: MutableMapping[str, Tensor] | None = None,
) -> Audit:
    """Run the ladder of attacks and judge. The same seed and device give the same card, but for its times.

    Args:
        rungs: see `run_attacks`; an audit that is interrupted continues from there.
        x, y: inputs (N, ...) and labels (N,), held out from training; some hundreds, since the intervals decide.
        space: what the inputs are and in which units epsilon counts, for the card's reader.

    Raises:
        InputError: as `check_data`.
    """
    ladder, started = ladder or Ladder(), time.monotonic()
    standing = run_attacks(model, x, y, ball, ladder, seed=seed, progress=progress, rungs=rungs)
    gaps = (
        Gap.paired(OVERESTIMATE, standing[PGD], standing[ENSEMBLE]),
        Gap.paired(WEAKNESS, standing[PGD], standing[STRONG]),
        Gap.paired(MASKING, standing[STRONG], standing[BLACK_BOX]),
    )
    rates = [Rate.of(name, hits) for name, hits in standing.items()]
    verdict, finding, reason = judge(rates, gaps, ladder)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: ladder.batch].to(x.device)
    measured = probe(model, x[rows], y[rows], ball, steps=ladder.pgd_steps, seed=seed)
    return Audit(
        verdict=verdict,
        finding=finding,
        reason=reason,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        space=space,
        epsilon=ball.epsilon,
        norm=ball.norm,
        clean=rates[0],
        rungs=tuple(rates[1:]),
        gaps=gaps,
        probe={name: round(value, 6) for name, value in vars(measured).items()},
        warnings=warnings_of(model, x, y, ball, ladder.batch),
        ladder=ladder,
        seed=seed,
        seconds=round(time.monotonic() - started, 2),
    )


def judge(rates: list[Rate], gaps: tuple[Gap, Gap, Gap], ladder: Ladder) -> tuple[Verdict, Finding, str]:
    """The verdict. Every comparison is made with an interval's end, so noise alone neither fails a model nor passes
    it."""
    clean, weak_pgd, strong_pgd, black, full = rates
    over, weak, masking = gaps
    if masking.low > 0:
        return "fail", "masked gradients", (
            f"an attack without gradients leaves {black}, {ladder.strong} {strong_pgd}: the gradients mislead, "
            f"and {full} is what stands"
        )  # fmt: skip
    if over.low > ladder.tolerance:
        words = f"{ladder.weak} reads {weak_pgd}, the ensemble leaves {full}: overestimated by {over} points"
        # Most of the gap is what more steps and restarts take: the attack was weak, masked gradients are not shown.
        if weak.mean >= over.mean / 2:
            return "fail", "weak attack", f"{words}, {100 * weak.mean:.1f} of them closed by {ladder.strong}"
        return "fail", "overestimated", f"{words}, and {ladder.strong} closes only {100 * weak.mean:.1f}"
    if ladder.floor is not None and full.high < ladder.floor:
        return "fail", "not robust", f"the ensemble leaves {full}, below the floor of {100 * ladder.floor:.1f}%"
    if over.high > ladder.tolerance:
        return "inconclusive", "undecided", (
            f"{ladder.weak} minus ensemble is {over} points, the tolerance {100 * ladder.tolerance:g}: too few inputs "
            f"to tell ({full.n})"
        )  # fmt: skip
    if ladder.floor is not None and full.low < ladder.floor:
        words = f"the ensemble leaves {full}, the floor is {100 * ladder.floor:.1f}%"
        return "inconclusive", "undecided", f"{words}: too few inputs to tell ({full.n})"
    return "pass", "sound", f"{ladder.weak} reads {weak_pgd}, the ensemble leaves {full} of {clean} clean"

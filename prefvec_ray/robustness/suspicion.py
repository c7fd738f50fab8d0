"""Warnings that a model is of a kind which standard attacks overestimate, after AutoAttack's flags (arXiv 2003.01690;
its repository's flags_doc.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefvec_ray.robustness.losses import cross_entropy_of, gradient_of
from prefvec_ray.robustness.threat import Ball, attacked

RUNS = 5
VARIATION = 1e-4
"""How far two runs of one input may lie apart, as a share of the logits' length."""


def warnings_of(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, batch: int = 256) -> tuple[str, ...]:
    """What speaks against gradient attacks on this model, in words, from the first `batch` inputs; usually nothing.

    Four are AutoAttack's: answers that vary, probabilities in place of logits, gradients of zero at a random start, and
    optimization while answering. AutoAttack's fifth, a black box that beats the gradients, is a verdict of the audit.
    """
    x, y = x[:batch], y[:batch]
    with attacked(model):
        with _counting_gradients() as calls, torch.no_grad():
            first = model(x)
        with torch.no_grad():
            others = torch.stack([model(x) for _ in range(RUNS - 1)])
        start = ball.around(x, torch.Generator().manual_seed(0))
        gradient = gradient_of(cross_entropy_of(model, y), start).flatten(1)
    apart = (others - first).norm(dim=2) / first.norm(dim=1).clamp_min(1e-10)
    flat = int((gradient == 0).all(1).sum())
    found = {
        "randomized: the same input gets different answers; attack the mean over several runs (EOT)": bool(
            (apart > VARIATION).any()
        ),
        "softmax: the model gives probabilities, not logits; cross-entropy attacks lose their gradients": bool(
            (first >= 0).all() and torch.allclose(first.sum(1), torch.ones_like(first[:, 0]), atol=1e-5)
        ),
        f"zero gradient: {flat} of {len(x)} inputs have none at a random start; gradient attacks cannot move them": (
            flat > 0
        ),
        "optimizes while answering: the model computes gradients itself; it needs an attack of its own": bool(calls),
    }
    return tuple(words for words, raised in found.items() if raised)


@contextmanager
def _counting_gradients() -> Iterator[list[str]]:
    """The calls of torch.autograd inside the block."""
    calls: list[str] = []
    names = ("grad", "backward")
    originals = {name: getattr(torch.autograd, name) for name in names}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(torch.autograd, name, counted(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)

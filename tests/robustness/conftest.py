"""Digits, and networks that are trained in seconds."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefvec_ray.robustness import Ball, Recipe, train_classifier
from prefvec_ray.robustness.images import Images, build_network, load_images

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Images:
    return load_images("digits", 10, train=900, watch=60, test=200)


@pytest.fixture(scope="session")
def many_digits() -> Images:
    """Three times as many to test on, `digits` among them: of 200, an interval can end beyond a tolerance by chance."""
    return load_images("digits", 10, train=900, watch=60, test=600)


@pytest.fixture(scope="session")
def plain(digits: Images) -> nn.Module:
    """A network trained on clean digits alone: right without an attack, and easily fooled."""
    torch.manual_seed(0)
    model = build_network("tiny", 1, 10)
    x, y = digits.train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def robust(many_digits: Images) -> nn.Module:
    """A few epochs of TRADES at epsilon 0.1, where nothing is masked."""
    torch.manual_seed(0)
    model = build_network("tiny", 1, 10)
    recipe = Recipe(epsilon=0.1, beta=6.0, epochs=4, inner_steps=5, watch_every=4)
    train_classifier(model, many_digits.train, many_digits.watch, recipe)
    return model.eval()


class Linear(nn.Module):
    """Logits x W^T + b over the flattened input: every attack on it has an exact answer."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture(scope="session")
def linear() -> type[Linear]:
    return Linear


def exactly_robust(model: Linear, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Which inputs of a linear model nothing in the ball can turn."""
    standing = torch.ones(len(x), dtype=torch.bool)
    for other in range(len(model.weight)):
        difference = model.weight[y] - model.weight[other]
        up = ball.project(torch.full_like(x, torch.inf), x).flatten(1)
        down = ball.project(torch.full_like(x, -torch.inf), x).flatten(1)
        worst = torch.where(difference > 0, down, up)
        if ball.norm == "l2":  # has a test of its own
            worst = ball.furthest(-difference, x.flatten(1))
        margin = (worst * difference).sum(1) + model.bias[y] - model.bias[other]
        standing &= (margin > 0) | (y == other)
    return standing.detach()


@pytest.fixture(scope="session")
def truth() -> object:
    return exactly_robust

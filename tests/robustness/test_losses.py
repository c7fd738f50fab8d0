"""TRADES against its published formula, PGD against what is exactly true of a linear model."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness import Ball, adversarial_loss, pgd, trades_loss
from prefvec_ray.robustness.losses import kl_rows
from prefvec_ray.robustness.threat import correct


def published_trades(model, x, y, epsilon, beta, steps, step_size, noise):
    """The formula of arXiv 1901.08573 as its authors compute it: probabilities as the target, sums over the batch."""
    model.eval()
    moved = x + 0.001 * noise
    for _ in range(steps):
        moved.requires_grad_()
        loss = F.kl_div(F.log_softmax(model(moved), 1), F.softmax(model(x), 1).detach(), reduction="sum")
        moved = moved.detach() + step_size * torch.autograd.grad(loss, moved)[0].sign()
        moved = torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0, 1)
    model.train()
    natural = F.cross_entropy(model(x), y)
    robust = F.kl_div(F.log_softmax(model(moved), 1), F.softmax(model(x), 1), reduction="sum") / len(x)
    return natural + beta * robust


def test_trades_equals_the_published_loss_and_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).train()
    x, y = torch.rand(6, 1, 3, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    expected = published_trades(model, x, y, 0.1, 6.0, 7, 0.03, noise)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = trades_loss(
        model, x, y, Ball(0.1), beta=6.0, steps=7, step_size=0.03, generator=torch.Generator().manual_seed(5)
    )
    # The inner start is clamped to the box here, and only after its first step there: the same after that step.
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.total, list(model.parameters())), wanted)
    assert loss.natural + 6 * loss.robust == pytest.approx(float(expected.detach()))
    assert model.training, "the model is left in its own mode"


def test_kl_by_hand_and_its_direction():
    clean, moved = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_rows(moved, clean).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_rows(clean, moved).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_gradients_stay_finite_where_probabilities_underflow():
    logits = torch.tensor([[0.0, -300.0], [200.0, 0.0]], requires_grad=True)
    moved = torch.tensor([[-300.0, 0.0], [0.0, 200.0]], requires_grad=True)
    for gradient in torch.autograd.grad(kl_rows(moved, logits).sum(), (logits, moved)):
        assert gradient.isfinite().all()
    naive = F.kl_div(moved.log_softmax(1), logits.softmax(1), reduction="sum")
    assert torch.autograd.grad(naive, logits)[0].isnan().any(), "the trap that log targets avoid"


def test_the_gradient_reaches_embeddings_through_both_terms(linear):
    table = torch.randn(4, 5, requires_grad=True)
    model = linear(torch.randn(2, 5))
    loss = trades_loss(
        model, table, torch.tensor([0, 1, 0, 1]), Ball(0.5, None, None), beta=1.0, generator=torch.Generator()
    )
    (both,) = torch.autograd.grad(loss.total, table, retain_graph=True)
    (natural,) = torch.autograd.grad(F.cross_entropy(model(table), torch.tensor([0, 1, 0, 1])), table)
    assert both.abs().sum() > 0
    assert not torch.allclose(both, natural)


@pytest.mark.parametrize(
    "ball", [Ball(0.1), Ball(0.3, None, None), Ball(0.2, 0.25, 0.75), Ball(0.6, None, None, norm="l2")]
)
def test_pgd_and_adversarial_training_reach_the_exact_worst_case_of_a_linear_model(linear, truth, ball):
    torch.manual_seed(1)
    model, x = linear(torch.randn(2, 9)), torch.rand(64, 9) * 0.5 + 0.25
    y = model(x).argmax(1)
    moved = pgd(model, x, y, ball, steps=20, step_size=ball.epsilon / 4)
    assert torch.equal(correct(model, moved, y), truth(model, x, y, ball))
    length = (moved - x).norm(p=2 if ball.norm == "l2" else torch.inf, dim=1)
    assert (length <= ball.epsilon + 1e-6).all()
    # Twelve steps of a quarter reach the far corner from anywhere, which is where a linear loss is largest. On a sphere
    # every step takes a fifth off the angle that is left.
    steps = 12 if ball.norm == "linf" else 40
    loss = adversarial_loss(model, x, y, ball, steps=steps, generator=torch.Generator().manual_seed(0))
    assert loss.robust == pytest.approx(float(F.cross_entropy(model(moved), y).detach()), rel=1e-3)


def test_restarts_only_take_away(plain, digits):
    x, y = digits.test
    one = pgd(plain, x, y, Ball(0.1), steps=3, step_size=0.02, seed=3)
    five = pgd(plain, x, y, Ball(0.1), steps=3, step_size=0.02, restarts=5, seed=3)
    stands_one, stands_five = correct(plain, one, y), correct(plain, five, y)
    assert not (stands_five & ~stands_one).any()
    assert stands_five.sum() < stands_one.sum()


def test_what_cannot_be_attacked_is_refused(plain, digits):
    x, y = digits.test
    with pytest.raises(InputError, match="beta 0"):
        trades_loss(plain, x, y, Ball(0.1), beta=0, generator=torch.Generator())
    with pytest.raises(InputError, match="PGD of 0 steps"):
        pgd(plain, x, y, Ball(0.1), steps=0, step_size=0.1)

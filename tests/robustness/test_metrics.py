"""FOSC and SGCS by hand."""

import pytest
import torch

from prefvec_ray.robustness import Ball, fosc, fosc_within, probe, relative, sgcs

BALL = Ball(0.5, None, None)
X = torch.tensor([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("moved", "gradient", "expected"),
    [
        ([1.2, 1.7], [0.0, 0.0], 0.0),  # stationary inside: no gradient
        ([1.5, 1.5], [3.0, -1.0], 0.0),  # on the boundary, in the corner that the gradient points to
        ([1.5, 2.0], [3.0, 0.0], 0.0),  # on the face that the gradient points to
        ([1.0, 2.0], [3.0, -1.0], 0.5 * 4.0),  # where it started: epsilon times the L1 norm
        ([0.5, 2.5], [3.0, -1.0], 2 * 0.5 * 4.0),  # the worst corner of all
        ([1.25, 2.0], [3.0, -1.0], 0.5 * 4.0 - 0.25 * 3.0),  # half the way in one coordinate
    ],
)
def test_fosc_by_hand(moved, gradient, expected):
    moved, gradient = torch.tensor([moved]), torch.tensor([gradient])
    assert fosc(gradient, moved, X, BALL).item() == pytest.approx(expected)
    assert fosc_within(gradient, moved, X, BALL).item() == pytest.approx(expected), "no limits: the same"


def test_fosc_is_the_maximum_that_its_definition_asks_for():
    torch.manual_seed(0)
    x, gradient = torch.rand(5, 3), torch.randn(5, 3)
    for ball in (Ball(0.3, None, None), Ball(0.3)):
        moved = ball.around(x, torch.Generator().manual_seed(1))
        corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * torch.inf
        reached = torch.stack([ball.project(corner.expand_as(x), x) for corner in corners])
        best = ((reached - moved) * gradient).sum(-1).max(0).values
        measure = fosc if ball.low is None else fosc_within
        torch.testing.assert_close(measure(gradient, moved, x, ball), best)


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, 1.0)])
def test_the_same_in_l2(low, high):
    torch.manual_seed(0)
    ball, x, gradient = Ball(0.5, low, high, norm="l2"), torch.rand(6, 3), torch.randn(6, 3)
    best = ball.furthest(gradient, x)
    assert (best - x).norm(dim=1).max() <= 0.5 + 1e-6
    assert ball.low is None or (best.min() >= 0 and best.max() <= 1)
    generator = torch.Generator().manual_seed(1)
    many = torch.stack([ball.project(x + 4 * torch.randn(6, 3), x) for _ in range(20_000)])
    reached = ((many - best) * gradient).sum(-1).max(0).values
    assert reached.max() <= 1e-5, "no other point of the ball is further"
    assert reached.min() > -0.02, "and some are nearly as far"
    moved = ball.around(x, generator)
    measure = fosc if ball.low is None else fosc_within
    torch.testing.assert_close(measure(gradient, moved, x, ball), ((best - moved) * gradient).sum(1))
    assert measure(gradient, best, x, ball).abs().max() < 1e-5
    assert relative(fosc(gradient, x, x, ball), gradient, ball).tolist() == pytest.approx([1.0] * 6)


def test_starts_fill_an_l2_ball_evenly():
    ball, x = Ball(2.0, None, None, norm="l2"), torch.zeros(4000, 2)
    inside = ball.around(x, torch.Generator().manual_seed(0)).norm(dim=1) < 1.0
    assert inside.float().mean().item() == pytest.approx(0.25, abs=0.03), "half the radius is a quarter of the disc"


def test_a_pixel_at_its_limit_is_stationary_within_the_limits_alone():
    x, gradient = torch.tensor([[0.0, 1.0]]), torch.tensor([[-2.0, 3.0]])
    assert fosc(gradient, x, x, Ball(0.1)).item() == pytest.approx(0.5)
    assert fosc_within(gradient, x, x, Ball(0.1)).item() == 0.0


def test_relative_fosc_does_not_depend_on_scales():
    gradient, moved = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.25, 2.0]])
    shares = [relative(fosc(scale * gradient, moved, X, BALL), scale * gradient, BALL) for scale in (1.0, 1e-3, 1e4)]
    for share in shares:
        assert share.item() == pytest.approx(1.25 / 2.0)
    nothing = torch.zeros(1, 2)
    assert relative(fosc(nothing, moved, X, BALL), nothing, BALL).item() == 0.0


def test_sgcs_by_hand():
    right, up, left = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[-5.0, 0.0]])
    assert sgcs([right, right * 7, right]).item() == pytest.approx(1.0)
    assert sgcs([right, up]).item() == pytest.approx(0.0)
    assert sgcs([right, left]).item() == pytest.approx(-1.0)
    assert sgcs([right, up, left, left]).item() == pytest.approx(1 / 3)


def test_a_linear_loss_is_stationary_after_pgd_and_straight_on_the_way(linear):
    weight = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 2.0, -0.5]])
    x, y = torch.rand(8, 3), torch.zeros(8, dtype=torch.long)
    found = probe(linear(weight), x, y, BALL, steps=10)
    assert found.fosc == pytest.approx(0.0, abs=1e-5)
    assert found.fosc_relative == pytest.approx(0.0, abs=1e-5)
    assert found.sgcs == pytest.approx(1.0, abs=1e-5)
    assert found.inner_gain > 0

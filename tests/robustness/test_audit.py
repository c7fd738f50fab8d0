"""The audit catches a model whose gradients lie, and passes one whose gradients do not."""

import json

import pytest
import torch
from torch import nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness import Ball, Ladder, audit
from prefvec_ray.robustness.audit import (
    BLACK_BOX,
    ENSEMBLE,
    MASKING,
    OVERESTIMATE,
    PGD,
    STRONG,
    WEAKNESS,
    judge,
    run_attacks,
)
from prefvec_ray.robustness.intervals import Gap, Rate
from prefvec_ray.robustness.suspicion import warnings_of

SHORT = Ladder(strong_steps=20, restarts=2, apgd_steps=10, fab_steps=2, square_queries=150)


class Saturated(nn.Module):
    """The same answers with logits a thousand times larger: softmax saturates in float32, and the cross-entropy has
    no gradient left wherever the answer is right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1000 * self.model(x)


@pytest.fixture(scope="module")
def masked(plain, digits):
    x, y = digits.test
    return audit(Saturated(plain), x, y, Ball(0.15), SHORT)


@pytest.fixture(scope="module")
def healthy(robust, many_digits):
    x, y = many_digits.test
    return audit(robust, x, y, Ball(0.1), SHORT)


def test_masked_gradients_are_caught(masked, plain, digits):
    assert masked.rung(PGD).mean > 0.5, "PGD is fooled"
    assert masked.rung(ENSEMBLE).mean < 0.2, "and little stands"
    assert masked.rung(BLACK_BOX).high < masked.rung(STRONG).low, "an attack without gradients beats 20 steps of it"
    assert masked.gap(MASKING).low > 0
    assert (masked.verdict, masked.finding) == ("fail", "masked gradients")
    assert "the gradients mislead" in masked.reason
    x, y = digits.test
    honest = audit(plain, x, y, Ball(0.15), SHORT)
    assert honest.finding != "masked gradients", "the same network without the factor"
    assert honest.rung(ENSEMBLE).mean == pytest.approx(masked.rung(ENSEMBLE).mean, abs=0.1)


@pytest.mark.slow
def test_a_healthy_model_passes(healthy):
    assert healthy.verdict == "pass", healthy.reason
    assert healthy.rung(PGD).mean > 0.5
    assert abs(healthy.gap(OVERESTIMATE).mean) < 0.03
    assert healthy.gap(MASKING).high < 0.02


def test_rungs_only_go_down(masked, healthy):
    for card in (masked, healthy):
        means = {rate.name: rate.mean for rate in (card.clean, *card.rungs)}
        assert means["clean"] >= means[PGD] >= means[STRONG] >= means[ENSEMBLE]
        assert means["clean"] >= means[BLACK_BOX] >= means[ENSEMBLE]


def test_the_card(healthy, robust, many_digits):
    card = json.loads(healthy.model_dump_json())
    assert card["format"] == 1
    assert {"verdict", "reason", "created", "model_digest", "space", "epsilon", "clean", "rungs", "words"} <= set(card)
    for rate in (card["clean"], *card["rungs"]):
        assert set(rate) == {"name", "mean", "low", "high", "n"}
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert rate["n"] == 600
    x, y = many_digits.test
    again = audit(robust, x, y, Ball(0.1), SHORT)
    kept = {"created", "seconds"}
    assert again.model_dump(exclude=kept) == healthy.model_dump(exclude=kept), "the same seed gives the same card"


def rates(shares, n):
    names = ("clean", PGD, STRONG, BLACK_BOX, ENSEMBLE)
    standing = [torch.arange(n) < round(share * n) for share in shares]
    gaps = tuple(
        Gap.paired(name, standing[a], standing[b])
        for name, a, b in ((OVERESTIMATE, 1, 4), (WEAKNESS, 1, 2), (MASKING, 2, 3))
    )
    return [Rate.of(name, hits) for name, hits in zip(names, standing, strict=True)], gaps


@pytest.mark.parametrize(
    ("shares", "n", "floor", "expected"),
    [
        ((0.9, 0.5, 0.49, 0.6, 0.48), 1000, None, ("pass", "sound")),
        ((0.9, 0.6, 0.4, 0.6, 0.38), 1000, None, ("fail", "weak attack")),
        ((0.9, 0.6, 0.58, 0.6, 0.4), 1000, None, ("fail", "overestimated")),
        ((0.9, 0.6, 0.58, 0.4, 0.38), 1000, None, ("fail", "masked gradients")),
        ((0.9, 0.5, 0.49, 0.6, 0.46), 60, None, ("inconclusive", "undecided")),
        ((0.9, 0.5, 0.49, 0.6, 0.48), 1000, 0.6, ("fail", "not robust")),
        ((0.9, 0.5, 0.49, 0.6, 0.48), 1000, 0.48, ("inconclusive", "undecided")),
        ((0.9, 0.0, 0.0, 0.1, 0.0), 1000, None, ("pass", "sound")),  # honest: it says that nothing stands
        ((0.9, 0.0, 0.0, 0.1, 0.0), 1000, 0.5, ("fail", "not robust")),
    ],
)
def test_verdicts(shares, n, floor, expected):
    measured, gaps = rates(shares, n)
    verdict, finding, reason = judge(measured, gaps, Ladder(floor=floor))
    assert (verdict, finding) == expected, reason


X, Y = torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4)
NAN = torch.full((8, 1, 4, 4), torch.nan)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y + 5, "label 6 is out of range: the classifier knows 0 to 2"),
        (X, Y - 1, "label -1 is out of range"),
        (X, Y * 0, "all labels are 0: a single class"),
        (X * 255, Y, r"inputs lie in .*the limits are \[0, 1\]; scale the inputs"),
        (X - 1, Y, "inputs lie in"),
        (NAN, Y, "input 0 holds NaN"),
        (X, Y.float(), "labels of shape"),
        (X, Y[:5], "labels of shape"),
        (X[:0], Y[:0], "no inputs"),
        ((X * 9).long(), Y, "expected floats"),
    ],
)
def test_bad_input_is_named(linear, x, y, message):
    with pytest.raises(InputError, match=message):
        audit(linear(torch.randn(3, 16)), x, y, Ball(0.1), SHORT)


@pytest.mark.parametrize("epsilon", [0, -0.1, float("nan"), float("inf"), "0.1", True])
def test_a_ball_needs_a_radius(epsilon):
    with pytest.raises(InputError, match="epsilon"):
        Ball(epsilon)


def test_limits_are_checked():
    with pytest.raises(InputError, match="the lower must be below"):
        Ball(0.1, 1.0, 0.0)
    with pytest.raises(InputError, match="give both"):
        Ball(0.1, 0.0, None)


def test_one_logit_is_no_classifier(linear):
    with pytest.raises(InputError, match="gives 1 logit"):
        audit(linear(torch.randn(1, 16)), X, Y, Ball(0.1), SHORT)


@pytest.mark.parametrize("classes", [2, 3])
def test_two_and_three_classes_have_right_answers(linear, truth, classes):
    torch.manual_seed(0)
    model, x = linear(torch.randn(classes, 16)), torch.rand(60, 1, 4, 4)
    y = model(x).argmax(1)
    found = audit(model, x, y, Ball(0.05), SHORT)
    exact = float(truth(model, x, y, Ball(0.05)).float().mean())
    assert found.rung(ENSEMBLE).mean == pytest.approx(exact, abs=0.02)


def test_a_ball_in_l2_has_right_answers_and_says_so_on_the_card(linear, truth):
    torch.manual_seed(0)
    model, x = linear(torch.randn(4, 16)), torch.rand(60, 1, 4, 4)
    y, ball = model(x).argmax(1), Ball(0.3, norm="l2")
    found = audit(model, x, y, ball, SHORT)
    assert found.norm == "l2"
    exact = float(truth(model, x, y, ball).float().mean())
    assert 0.2 < exact < 0.8
    assert found.rung(ENSEMBLE).mean == pytest.approx(exact, abs=0.02)


class Odd(nn.Module):
    """A linear model with one habit that misleads attacks."""

    def __init__(self, model: nn.Module, habit: str) -> None:
        super().__init__()
        self.model, self.habit = model, habit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.model(x)
        if self.habit == "randomized":
            return logits + 0.01 * torch.randn_like(logits)
        if self.habit == "softmax":
            return logits.softmax(1)
        if self.habit == "zero gradient":
            return 1000 * logits
        if self.habit == "optimizes while answering":
            with torch.enable_grad():
                moved = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.model(moved).amax(1).sum(), moved)
            return self.model(x + 0.01 * slope.sign())
        return logits


HABITS = ["randomized", "softmax", "zero gradient", "optimizes while answering"]


@pytest.mark.parametrize("habit", [*HABITS, "none"])
def test_habits_that_mislead_attacks_are_warned_of(linear, habit):
    torch.manual_seed(0)
    plain, x = linear(torch.randn(4, 16)), torch.rand(60, 16)
    y = plain(x).argmax(1)
    raised = warnings_of(Odd(plain, habit), x, y, Ball(0.01))
    assert [words.split(":")[0] for words in raised] == ([] if habit == "none" else [habit])


def test_what_is_attacked_already_is_not_attacked_again(plain, digits):
    x, y = digits.test[0][:40], digits.test[1][:40]
    short = Ladder(strong_steps=2, restarts=1, apgd_steps=2, fab_steps=1, square_queries=5)
    nothing = torch.zeros(40, dtype=torch.bool)
    rungs = run_attacks(plain, x, y, Ball(0.1), short, rungs={PGD: nothing})
    assert not rungs[STRONG].any(), "it starts from what is known"
    assert rungs[BLACK_BOX].any()


def test_intervals_against_published_values():
    # Wilson (1927) for 0 of 10 and 5 of 10, as any table of it has them.
    assert (Rate.counted("", 0, 10).high, Rate.counted("", 5, 10).low) == pytest.approx((0.2775, 0.2366), abs=1e-4)
    # Student's t, 3 runs: 4.303 times the standard error.
    gap = Gap.over_runs("", [1.0, 2.0, 3.0])
    assert (gap.mean, gap.high - gap.mean) == pytest.approx((2.0, 4.3027 / 3**0.5), abs=1e-3)
    assert Gap.over_runs("", [1.0]).low == -float("inf")

"""Sampling: the right distribution, nothing outside the nucleus, and a row's choice its own."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from prefvec_ray.serving.engines.sampling import adjusted, choose
from prefvec_ray.serving.engines.sampling_params import SamplingParams

LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -1e30])


def ask(temperature: float, top_p: float = 1.0, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, **more)


def draw(params: SamplingParams, times: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [choose(LOGITS_V[None], [params], [generator])[0] for _ in range(times)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability(temperature):
    counts = Counter(draw(ask(temperature), 3000))
    expected_V = torch.softmax(LOGITS_V / temperature, -1)
    for token, probability in enumerate(expected_V.tolist()):
        # Five standard deviations of a binomial count; the seed is fixed, so this passes always or never.
        spread = 5 * (probability * (1 - probability) / 3000) ** 0.5
        assert abs(counts[token] / 3000 - probability) <= spread


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_its_proportions():
    p_V = torch.softmax(LOGITS_V, -1)
    counts = Counter(draw(ask(1.0, top_p=float(p_V[0]) + 0.01), 3000))
    assert set(counts) == {0, 1}, "the first alone falls short by 0.01, so the second belongs in"
    assert counts[0] / counts[1] == pytest.approx(float(p_V[0] / p_V[1]), rel=0.15)
    assert set(draw(ask(1.0, top_p=1e-9), 50)) == {0}


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"min_p": 0.1}, {0, 1, 2}),  # exp(-2) of the likeliest is in, exp(-3) is not
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.2}, {0, 1}),
        # Of the two that are left, the first has 73%: with 70% asked for it is enough alone, of all four it has 64%.
        ({"top_k": 2, "top_p": 0.7}, {0}),
        ({"top_p": 0.7}, {0, 1}),
    ],
    ids=str,
)
def test_cuts_leave_these_tokens_and_their_proportions(cut, left):
    counts = Counter(draw(ask(1.0, **cut), 3000))
    assert set(counts) == left
    if len(left) > 1:
        assert counts[0] / counts[1] == pytest.approx(float(torch.exp(LOGITS_V[0] - LOGITS_V[1])), rel=0.15)


def test_bias_and_penalties_change_logits_as_their_definitions_say():
    logits_V = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    prompt, answer = [1, 3], [0, 0, 4]
    cases = {
        ("frequency_penalty", 0.5): [2.0 - 1.0, -1.0, 0.5, 3.0, -2.0 - 0.5],
        ("presence_penalty", 0.5): [2.0 - 0.5, -1.0, 0.5, 3.0, -2.0 - 0.5],
        ("presence_penalty", -2.0): [2.0 + 2.0, -1.0, 0.5, 3.0, -2.0 + 2.0],
        ("repetition_penalty", 2.0): [2.0 / 2, -1.0 * 2, 0.5, 3.0 / 2, -2.0 * 2],
    }
    for (name, value), expected in cases.items():
        got = adjusted(logits_V[None], [ask(0, **{name: value})], [prompt], [answer])
        assert got[0].tolist() == pytest.approx(expected), name
    biased = adjusted(logits_V[None], [ask(0, logit_bias={"2": 10.0, "3": -100.0})], [prompt], [answer])
    assert biased[0].tolist() == pytest.approx([2.0, -1.0, 10.5, -97.0, -2.0])
    assert choose(biased, [ask(0)], [random.Random(0)]) == [2]
    both = [ask(0), ask(0, presence_penalty=1.0)]
    together = adjusted(logits_V.repeat(2, 1), both, [prompt, prompt], [answer, []])
    assert torch.equal(together, logits_V.repeat(2, 1)), "each row by its own answer"
    assert adjusted(logits_V[None], [ask(0.3)], [prompt], [answer]).data_ptr() == logits_V.data_ptr()


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6])
def test_no_temperature_is_greedy(temperature):
    assert set(draw(ask(temperature), 20)) == {0}


def test_a_row_chooses_what_it_chooses_alone():
    rows = [ask(1.0), ask(0.0), ask(0.7, 0.5), ask(1.5), ask(1.0, 0.9)]
    logits_RV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    together = choose(logits_RV, rows, [random.Random(i) for i in range(5)])
    alone = [choose(logits_RV[i : i + 1], [rows[i]], [random.Random(i)])[0] for i in range(5)]
    assert together == alone

"""Sampling: the right distribution, nothing outside the nucleus, and a row's choice its own."""

import random
from collections import Counter

import pytest
import torch

from prefvec_ray.serving.engines.sampling import choose
from prefvec_ray.serving.engines.sampling_params import SamplingParams

LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -1e30])


def ask(temperature: float, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p)


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


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6])
def test_no_temperature_is_greedy(temperature):
    assert set(draw(ask(temperature), 20)) == {0}


def test_a_row_chooses_what_it_chooses_alone():
    rows = [ask(1.0), ask(0.0), ask(0.7, 0.5), ask(1.5), ask(1.0, 0.9)]
    logits_RV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    together = choose(logits_RV, rows, [random.Random(i) for i in range(5)])
    alone = [choose(logits_RV[i : i + 1], [rows[i]], [random.Random(i)])[0] for i in range(5)]
    assert together == alone

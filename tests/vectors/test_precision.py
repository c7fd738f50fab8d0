"""The precision report against the truth."""

import math

import pytest
import torch

from prefvec_ray.vectors import Full, LowRank, RoundingStats
from prefvec_ray.vectors.entries import error_norm
from prefvec_ray.vectors.precision import StorageLoss, ulp


def delta_like(weights, size):
    """Rank 16 plus 30% noise, `size` times as large as the weights: what DPO leaves behind."""
    rows, columns = weights.shape
    change = torch.randn(rows, 16) @ torch.randn(16, columns) / 4 + 0.3 * torch.randn(rows, columns)
    return change / change.norm() * weights.norm() * size / math.sqrt(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3e-4, 1e-3, 3e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("base_is_rounded", [False, True])
def test_the_expected_cosine_is_the_true_one(dtype, size, base_is_rounded):
    """Without ever seeing the exact phi. A base that lay on the rounded grid before training is a little better off
    than the estimate says."""
    torch.manual_seed(0)
    weights = torch.randn(512, 512) * 0.02
    if base_is_rounded:
        weights = weights.to(dtype).float()
    plus, minus = delta_like(weights, size), delta_like(weights, size)
    sources = [(weights + change).to(dtype) for change in (plus, minus)]
    stats = RoundingStats()
    for rows in range(0, 512, 128):
        stats.update(sources[0][rows : rows + 128], sources[1][rows : rows + 128])
    measured = sources[0].float() - sources[1].float()
    truth = torch.nn.functional.cosine_similarity(measured.flatten(), (plus - minus).flatten(), dim=0).item()
    report = stats.report()
    assert report["expected_cosine"] == pytest.approx(truth, abs=0.015 if not base_is_rounded else 0.08)
    assert report["zero_fraction"] == pytest.approx((measured == 0).float().mean().item())
    if not base_is_rounded:
        noise = (measured - plus + minus).norm() / (plus - minus).norm()
        assert report["noise_to_signal"] == pytest.approx(noise.item(), rel=0.06)


def test_fp32_sources_have_no_rounding_to_speak_of():
    torch.manual_seed(0)
    weights = torch.randn(256, 256) * 0.02
    stats = RoundingStats()
    stats.update(weights + delta_like(weights, 1e-3), weights + delta_like(weights, 1e-3))
    cosine = stats.report()["expected_cosine"]
    assert isinstance(cosine, float)
    assert cosine > 0.99999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulp(dtype):
    values = torch.cat([torch.randn(2000) * 0.02, torch.tensor([1.0, -1.0, 0.5, 3.0, 1e-3])]).to(dtype)
    up = torch.nextafter(values.abs(), torch.tensor(math.inf, dtype=dtype)).double() - values.abs().double()
    assert torch.equal(ulp(values).double(), up)


def test_storage_loss_of_factors_is_that_of_their_product():
    exact = LowRank(torch.randn(3, 20), torch.randn(30, 3))
    stored = LowRank(exact.A_RI.bfloat16(), exact.B_OR.bfloat16())
    dense = (exact.dense().double() - stored.dense().double()).square().sum().item()
    assert error_norm(exact, stored) == pytest.approx(dense, rel=1e-4)
    loss = StorageLoss()
    loss.update("w", exact, stored)
    loss.update("v", Full(torch.ones(3)), Full(torch.ones(3)))
    assert loss.report()["worst_entry"] == "w"
    assert exact.squared_norm() == pytest.approx(exact.dense().double().square().sum().item(), rel=1e-5)

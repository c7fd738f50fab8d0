"""Norms, angles and ranks against their definitions."""

import math

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import to_low_rank, vector_from_state
from prefvec_ray.vectors.inspect import cosine, effective_rank, inspect, plot


def vector(seed, rank=3, base="blake3:0"):
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)

    delta = {
        "model.layers.0.w": matrix(12, 8),
        "model.layers.1.w": matrix(8, 12) * 2,
        "model.layers.10.norm": torch.randn(8, generator=generator),
        "lm_head": matrix(20, 8),
    }
    return vector_from_state(delta, preference=f"p{seed}", base_fingerprint=base)


def flat(vector):
    return torch.cat([vector.dense(name).flatten() for name in vector.names()]).double()


@pytest.mark.parametrize("convert", [lambda v: v, lambda v: to_low_rank(v, rank=3)])
def test_angles_and_norms(convert):
    a, b = convert(vector(1)), convert(vector(2))
    summary = inspect({"a": a, "b": b})
    expected = torch.nn.functional.cosine_similarity(flat(vector(1)), flat(vector(2)), dim=0).item()
    assert summary.cosines["a", "b"] == pytest.approx(expected, abs=1e-5)
    assert summary.cosines["a", "a"] == pytest.approx(1.0)
    assert summary.norms["a"] == pytest.approx(flat(vector(1)).norm().item(), rel=1e-5)
    assert list(summary.layer_norms["a"]) == ["0", "1", "10", "lm_head"]
    assert summary.layer_norms["a"]["10"] == pytest.approx(a.dense("model.layers.10.norm").norm().item(), rel=1e-5)


def test_ranks():
    summary = inspect({"a": vector(1)}, ranks=(1, 2, 3, 8))
    energy = summary.energy_by_rank["a"]
    assert energy[1] < energy[2] < energy[3] == pytest.approx(1.0) == energy[8]
    shortened = to_low_rank(vector(1), rank=2)
    assert energy[2] == pytest.approx((flat(shortened).norm() / flat(vector(1)).norm()).item() ** 2, rel=1e-5)
    assert all(1 <= rank <= 3.001 for rank in summary.effective_ranks["a"].values())
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)


def test_a_plot(tmp_path):
    file = plot(inspect({"helpful": vector(1), "harmless": vector(2)}), tmp_path / "vectors.svg")
    text = file.read_text()
    assert "<svg" in text
    assert plot(inspect({"helpful": vector(1)}), tmp_path / "one.png").stat().st_size > 5000


def test_vectors_of_two_bases_have_no_angle():
    with pytest.raises(InputError, match="is of base"):
        cosine(vector(1), vector(2, base="blake3:1"))
    with pytest.raises(InputError, match="no vector"):
        inspect({})
    assert math.isfinite(cosine(vector(1), vector(2)))

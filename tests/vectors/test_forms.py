"""Other forms of the same vector, and the errors that they state."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import Int8, LowRank, to_dtype, to_full, to_int8, to_low_rank, vector_from_state
from prefvec_ray.vectors.forms import singular_values


@pytest.fixture
def vector():
    torch.manual_seed(0)
    rank_5 = torch.randn(30, 5) @ torch.randn(5, 20)
    delta = {
        "wide": torch.randn(12, 40),
        "tall": torch.randn(40, 12),
        "rank 5": rank_5,
        "experts": torch.randn(3, 10, 8),
        "norm": torch.randn(16),
        "row of zeros": torch.cat([torch.zeros(1, 7), torch.randn(3, 7)]),
    }
    return vector_from_state(delta, preference="p", base_fingerprint="blake3:0")


def relative_error(exact, other):
    lost = sum((exact.dense(n).double() - other.dense(n).double()).square().sum() for n in exact.names())
    return float((lost / sum(exact.dense(n).double().square().sum() for n in exact.names())).sqrt())


CONVERSIONS = {
    "bf16": (lambda v: to_dtype(v, torch.bfloat16), 0.0012, 0.0022),
    "fp16": (lambda v: to_dtype(v, torch.float16), 0.0001, 0.0003),
    "int8": (to_int8, 0.003, 0.009),
    "rank 3": (lambda v: to_low_rank(v, rank=3), 0.4, 0.8),
    "energy": (lambda v: to_low_rank(v, energy=0.99), 0.001, 0.1),
    "all energy": (lambda v: to_low_rank(v, energy=1.0), 0, 1e-6),
    "full": (to_full, 0.0012, 0.0022),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_the_stated_error_is_the_true_one(conversion, vector):
    convert, low, high = CONVERSIONS[conversion]
    other = convert(vector)
    precision: dict[str, Any] = other.info.precision
    stated = precision["conversions"][-1]["relative_error"]
    assert stated == pytest.approx(relative_error(vector, other), rel=1e-3, abs=1e-7)
    assert low <= stated <= high
    assert other.names() == vector.names()
    assert all(other.shape(name) == vector.shape(name) for name in vector.names())
    assert other.info.base_fingerprint == vector.info.base_fingerprint


def test_truncation_is_the_best_of_its_rank(vector):
    """Against torch's own SVD in float64."""
    low = to_low_rank(vector, rank=3)
    for name in ("wide", "tall", "experts", "rank 5"):
        U, S, Vh = torch.linalg.svd(vector.dense(name).double(), full_matrices=False)
        best = (U[..., :3] * S[..., None, :3]) @ Vh[..., :3, :]
        torch.testing.assert_close(low.dense(name).double(), best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(singular_values(vector.entry(name)), S, atol=1e-6, rtol=1e-6)
        entry = low.entry(name)
        assert isinstance(entry, LowRank)
        assert entry.rank == 3
    assert not isinstance(low.entry("norm"), LowRank)
    assert torch.equal(low.dense("norm"), vector.dense("norm"))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy, vector):
    low = to_low_rank(vector, energy=energy)
    exact = to_low_rank(vector, energy=1.0).entry("rank 5")
    assert isinstance(exact, LowRank)
    assert exact.rank == 5
    for name in ("wide", "tall", "rank 5"):
        squares = torch.linalg.svdvals(vector.dense(name).double()).square()
        kept, entry = squares.cumsum(0) / squares.sum(), low.entry(name)
        assert isinstance(entry, LowRank)
        assert kept[entry.rank - 1] >= energy - 1e-9
        assert entry.rank == 1 or kept[entry.rank - 2] < energy


def test_a_low_rank_vector_is_shortened_from_its_factors(vector):
    once, twice = to_low_rank(vector, rank=2), to_low_rank(to_low_rank(vector, rank=4), rank=2)
    for name in ("wide", "experts"):
        torch.testing.assert_close(once.dense(name), twice.dense(name), atol=1e-5, rtol=1e-4)
    conversions = twice.info.precision["conversions"]
    assert isinstance(conversions, list)
    assert len(conversions) == 2


def test_int8_has_one_scale_per_row(vector):
    entry = to_int8(vector).entry("experts")
    assert isinstance(entry, Int8)
    assert entry.scale.shape == (3, 10)
    assert torch.equal(entry.values.abs().amax(-1), torch.full((3, 10), 127, dtype=torch.int8))
    assert to_int8(vector).dense("row of zeros")[0].eq(0).all()
    again = to_dtype(to_int8(vector), torch.float32)
    assert again.info.form == "full"
    assert torch.equal(again.dense("experts"), to_int8(vector).dense("experts"))


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(-30, 30), st.sampled_from([torch.float16, torch.bfloat16]))
def test_rounding_is_within_half_an_ulp(rows, columns, log_scale, dtype):
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 2.0 ** min(log_scale, 10)
    vector = vector_from_state({"w": delta}, preference="p", base_fingerprint="blake3:0")
    info = torch.finfo(dtype)
    error = (to_dtype(vector, dtype).dense("w") - delta).abs()
    assert (error <= delta.abs() * info.eps / 2 + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize(
    ("convert", "named"),
    [
        (lambda v: to_low_rank(v), "either rank or energy"),
        (lambda v: to_low_rank(v, rank=2, energy=0.5), "either rank or energy"),
        (lambda v: to_low_rank(v, rank=0), "rank is 0"),
        (lambda v: to_low_rank(v, energy=1.5), "energy is 1.5"),
        (lambda v: to_dtype(v, torch.int8), "cannot store a vector in torch.int8"),
        (lambda v: to_dtype(v, torch.float64), "cannot store a vector in torch.float64"),
    ],
)
def test_bad_requests_are_refused(convert, named, vector):
    with pytest.raises(InputError, match=named):
        convert(vector)


def test_overflow_is_refused():
    large = vector_from_state({"w": torch.full((2, 2), 1e6)}, preference="p", base_fingerprint="blake3:0")
    with pytest.raises(InputError, match="'w' of 'p' overflows float16"):
        to_dtype(large, torch.float16)

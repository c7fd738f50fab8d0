"""Reading numbers once: the digest, and NaN and infinity wherever they are."""

import math

import pytest
import torch

from prefvec_ray.vectors import numbers
from prefvec_ray.vectors.numbers import is_finite, read_tensor, tensor_digest

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(dtype, bad, monkeypatch):
    monkeypatch.setattr(numbers, "PIECE", 128)
    monkeypatch.setattr(numbers, "BLOCK", 64)
    for place in range(0, 99, 7):
        values = torch.randn(99, generator=torch.Generator().manual_seed(place)).to(dtype)
        assert is_finite(values)
        assert read_tensor(values)[1]
        values[place] = bad
        assert not is_finite(values)
        assert read_tensor(values) == (tensor_digest(values), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0, info.smallest_normal / 2], dtype=dtype)
    assert is_finite(values)
    assert read_tensor(values)[1]


def test_every_bit_pattern_of_two_bytes_is_judged_as_torch_judges_it():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        for value in patterns.view(dtype).split(1):
            assert is_finite(value) == bool(torch.isfinite(value).all())


@pytest.mark.parametrize(
    "values", [torch.tensor(1.5), torch.empty(0, 3), torch.arange(7), torch.randn(6, 4).T, torch.randn(2, 3)[:, 1]]
)
def test_scalars_empty_integer_and_transposed_tensors(values):
    seen = bytearray()
    assert is_finite(values)
    assert read_tensor(values, seen=seen.extend) == (tensor_digest(values.clone()), True)
    assert bytes(seen) == values.contiguous().numpy().tobytes()


def test_the_digest_does_not_depend_on_the_pieces(monkeypatch):
    values = torch.randn(1000)
    whole = tensor_digest(values)
    monkeypatch.setattr(numbers, "PIECE", 12)
    assert tensor_digest(values) == whole

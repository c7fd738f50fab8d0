"""y += ((x A^T) * S) B, compiled and by torch, against float64."""

from typing import Any

import pytest
import torch

from prefvec_ray.vectors import row_steering
from prefvec_ray.vectors._native import openmp, steer_library
from prefvec_ray.vectors.row_steering import FEW, add_steered

needs_compiler = pytest.mark.skipif(steer_library() is None, reason="no C++ compiler here")

SHAPES = [
    (1, 64, [64, 32, 32], 8),
    (3, 7, [5], 1),
    (5, 67, [33, 7], 6),
    (16, 512, [1376, 1376], 32),
    (FEW, 100, [50, 1], 5),
    (FEW + 1, 40, [48], 4),
]


def case(rows: int, inputs: int, sizes: list[int], columns: int, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    scales = some(rows + 3, columns)
    scales[::2, 0] = 0.0  # a column that some rows do not use
    scales[:, -1] = 0.0 if columns > 1 else 1.0  # and one that none uses
    y = some(rows, sum(sizes) + 2)[:, : sum(sizes)]
    x = some(rows, inputs + 5)[:, :inputs]
    B = [some(columns, size) for size in sizes]
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return {"y": y, "x": x, "A": some(len(sizes) * columns, inputs), "scales": scales[:rows], "B": B, "starts": starts}


def exact(y, x, A, scales, B, starts):
    y = y.double().clone()
    for part, (B_CO, start) in enumerate(zip(B, starts, strict=True)):
        A_CI = A[part * scales.shape[1] : (part + 1) * scales.shape[1]]
        y[:, start : start + B_CO.shape[1]] += ((x.double() @ A_CI.double().T) * scales.double()) @ B_CO.double()
    return y


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_sum_in_float64(shape, native, threads, monkeypatch):
    if not native:
        monkeypatch.setattr(row_steering, "steer_library", lambda: None)
    given, before = case(*shape), torch.get_num_threads()
    truth = exact(**given)
    torch.set_num_threads(threads)
    try:
        add_steered(**given)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(given["y"].double(), truth, rtol=1e-5, atol=2e-5 * truth.abs().max().item())


@needs_compiler
def test_rows_of_zeros_stay_as_they_are_bit_for_bit():
    given = case(9, 33, [20, 30], 4)
    given["scales"][:] = 0.0
    given["scales"][8] = 1.0  # the last row alone
    before = given["y"].clone()
    add_steered(**given)
    assert torch.equal(given["y"][:8], before[:8])
    assert not torch.equal(given["y"][8], before[8])


@needs_compiler
def test_no_row_depends_on_the_rows_beside_it():
    given = case(11, 64, [48], 8)
    alone = [{**given, "y": given["y"][i : i + 1].clone(), "x": given["x"][i : i + 1]} for i in range(11)]
    add_steered(**given)
    for i, one in enumerate(alone):
        add_steered(**{**one, "scales": given["scales"][i : i + 1]})
        torch.testing.assert_close(one["y"], given["y"][i : i + 1], rtol=1e-6, atol=1e-5)


@needs_compiler
def test_the_threads_are_those_of_torch():
    torch.ones(8, 8) @ torch.ones(8, 8)
    assert openmp()


def test_half_precision_goes_through_torch():
    given = case(6, 32, [16], 4)
    rounded = {name: value.bfloat16() for name, value in given.items() if name in ("y", "x", "A")}
    rounded |= {"B": [B_CO.bfloat16() for B_CO in given["B"]], "scales": given["scales"], "starts": given["starts"]}
    truth = exact(**rounded)
    add_steered(**rounded)
    torch.testing.assert_close(rounded["y"].double(), truth, rtol=0.02, atol=0.02 * truth.abs().max().item())

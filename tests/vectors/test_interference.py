"""Vectors made to interfere less: each method against its definition."""

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import combine, ties, vector_from_state
from prefvec_ray.vectors.interference import orthogonal_parts, singular_parts, ties_parts

BASE = "blake3:" + "0" * 64


def vector(name, delta):
    return vector_from_state(delta, preference=name, base_fingerprint=BASE)


def random_vectors(count=3):
    shapes = {"w": (6, 8), "tall": (9, 4), "norm": (5,)}
    found = {}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        found[f"p{seed}"] = vector(f"p{seed}", {n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    return found


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_the_parts_of_ties_sum_to_it(density):
    vectors = random_vectors()
    once = dict.fromkeys(vectors, 1.0)
    whole = ties(vectors, once, density=density, preference="all")
    parts = combine(ties_parts(vectors, density=density), once, preference="all")
    for name in whole.names():
        torch.testing.assert_close(parts.dense(name), whole.dense(name))


def test_orthogonal_parts():
    vectors = random_vectors()
    parts = orthogonal_parts(vectors)
    for name in ("w", "tall", "norm"):
        flat = torch.stack([parts[key].dense(name).flatten() for key in vectors])
        norms = torch.stack([vectors[key].dense(name).norm() for key in vectors])
        torch.testing.assert_close(flat @ flat.T, torch.diag(norms**2), atol=1e-5, rtol=1e-5)
    again = orthogonal_parts(parts)
    reverse = orthogonal_parts(dict(reversed(vectors.items())))
    for key in vectors:
        torch.testing.assert_close(again[key].dense("w"), parts[key].dense("w"))
        assert torch.equal(reverse[key].dense("w"), parts[key].dense("w"))
    assert parts["p0"].info.parents == {key: v.digest() for key, v in vectors.items()}


def test_what_only_one_vector_changes_stays_as_it_is():
    first, second = vector("a", {"w": torch.ones(2, 2), "v": torch.ones(3)}), vector("b", {"w": torch.eye(2)})
    parts = orthogonal_parts({"a": first, "b": second})
    torch.testing.assert_close(parts["a"].dense("v"), torch.ones(3))
    assert "v" not in parts["b"]


def test_one_direction_cannot_be_made_orthogonal():
    delta = {"w": torch.ones(2, 2)}
    with pytest.raises(InputError, match="'w' is changed in one direction by a, b"):
        orthogonal_parts({"a": vector("a", delta), "b": vector("b", {"w": 2 * delta["w"]})})


def test_singular_parts_share_no_direction():
    vectors = random_vectors(2)
    parts = singular_parts(vectors)
    for name, rank in (("w", 3), ("tall", 2)):
        first, second = parts["p0"].dense(name), parts["p1"].dense(name)
        assert [int(torch.linalg.matrix_rank(part)) for part in (first, second)] == [rank, rank]
        zero = torch.zeros(first.shape[1], first.shape[1])
        torch.testing.assert_close(first.T @ second, zero, atol=1e-5, rtol=0)  # no common output
        zero = torch.zeros(first.shape[0], first.shape[0])
        torch.testing.assert_close(first @ second.T, zero, atol=1e-5, rtol=0)  # no common input
    assert torch.equal(parts["p0"].dense("norm"), vectors["p0"].dense("norm"))


def test_singular_parts_of_what_does_not_meet_are_the_vectors_themselves():
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0, 1], first[1, 0], second[2, 3], second[3, 2] = 3.0, -2.0, 1.0, 5.0
    parts = singular_parts({"a": vector("a", {"w": first}), "b": vector("b", {"w": second})})
    torch.testing.assert_close(parts["a"].dense("w"), first)
    torch.testing.assert_close(parts["b"].dense("w"), second)

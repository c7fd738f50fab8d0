"""Merging against float64, laws of the algebra, and the named methods against their papers' definitions."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    LowRank,
    checkpoint_state,
    combine,
    dare,
    fingerprint,
    keep_largest,
    merge,
    reward_soup,
    ties,
    to_int8,
    to_low_rank,
    vector_from_state,
)
from prefvec_ray.vectors.algebra import magnitude_threshold

FAMILIES = ["llama", "mistral", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe"]
FORMS = {
    "full": lambda vector: vector,
    "low-rank": lambda vector: to_low_rank(vector, rank=4),
    "int8": to_int8,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_merged_logits_are_those_of_a_float64_merge(family, form, tiny_model, random_vector, tokens):
    model = tiny_model(family)
    vectors = {key: FORMS[form](random_vector(model, seed, scale=0.01)) for seed, key in enumerate("ab")}
    eta = {"a": 0.7, "b": -0.4}
    live, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the grouped product of experts has no float64
    live_state, exact_state = checkpoint_state(live), checkpoint_state(exact)
    with torch.no_grad():
        for name, tensor in merge(live_state, vectors, eta).items():
            live_state[name].copy_(tensor)
        for key, vector in vectors.items():
            for name in vector.names():
                exact_state[name] += vector.dense(name).double() * eta[key]
        torch.testing.assert_close(live(tokens).logits.double(), exact(tokens).logits, atol=2e-4, rtol=1e-4)


def toy(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (5, 4), "v": (3,), "only base": (2,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def toy_vector(seed, base, **options):
    delta = {name: tensor.float() for name, tensor in toy(seed).items() if name != "only base"}
    return vector_from_state(delta, preference=f"p{seed}", base_fingerprint=fingerprint(base), **options)


ETA = st.floats(-2, 2, width=32).map(lambda eta: 0.0 if abs(eta) < 1e-6 else eta)


@settings(max_examples=60)
@given(ETA, ETA, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_one_rounding_of_the_exact_sum(first, second, dtype):
    base = toy(0, dtype)
    vectors = {"a": toy_vector(1, base), "b": toy_vector(2, base)}
    merged = merge(base, vectors, {"a": first, "b": second})
    for name in ("w", "v"):
        exact = base[name].double() + sum(
            eta * vectors[key].dense(name).double() for key, eta in (("a", first), ("b", second))
        )
        ulp = torch.finfo(dtype).eps
        bound = exact.abs() * ulp / 2 + 1e-6 + torch.finfo(dtype).smallest_normal
        assert merged[name].dtype == dtype
        assert ((merged[name].double() - exact).abs() <= bound).all()


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([{}, {"a": 0}, {"a": -0.0}]))
def test_zero_is_the_base_bit_for_bit(dtype, eta):
    base = toy(0, dtype) | {"w": torch.tensor([[0.0, -0.0, 1.0, -1e-7]] * 5).to(dtype)}
    merged = merge(base, {"a": toy_vector(1, base)}, eta)
    assert all(torch.equal(merged[name], base[name]) for name in base)
    assert torch.equal(merged["w"].signbit(), base["w"].signbit())


@given(st.permutations("abc"), st.tuples(ETA, ETA, ETA))
def test_the_order_of_vectors_does_not_matter(order, values):
    base = toy(0)
    eta = dict(zip("abc", values, strict=True))
    vectors = {key: toy_vector(seed, base) for seed, key in enumerate("abc", start=1)}
    expected = merge(base, vectors, eta)
    shuffled = merge(base, {key: vectors[key] for key in order}, {key: eta[key] for key in reversed(order)})
    assert all(torch.equal(expected[name], shuffled[name]) for name in base)


@settings(max_examples=60)
@given(ETA, ETA, ETA)
def test_combining_is_linear(first, second, factor):
    base = toy(0)
    vectors = {"a": toy_vector(1, base), "b": to_low_rank(toy_vector(2, base), rank=2)}

    def dense(eta):
        try:
            vector = combine(vectors, eta, preference="sum")
        except InputError:  # a sum that is exactly 0 is no vector
            return {"w": torch.zeros(5, 4), "v": torch.zeros(3)}
        return {name: vector.dense(name) for name in ("w", "v")}

    one, scaled = dense({"a": first, "b": second}), dense({"a": first * factor, "b": second * factor})
    for name in ("w", "v"):
        torch.testing.assert_close(scaled[name], one[name] * factor, atol=1e-5, rtol=1e-5)
        parts = dense({"a": first})[name] + dense({"b": second})[name]
        torch.testing.assert_close(one[name], parts, atol=1e-5, rtol=1e-5)


def test_a_combination_merges_like_its_parts():
    base = toy(0)
    vectors = {"a": to_low_rank(toy_vector(1, base), rank=2), "b": to_low_rank(toy_vector(2, base), rank=3)}
    together = combine(vectors, {"a": 0.5, "b": 2.0}, preference="both")
    entry = together.entry("w")
    assert isinstance(entry, LowRank)
    assert entry.rank == 5
    assert together.info.parents == {key: vector.digest() for key, vector in vectors.items()}
    apart = merge(base, vectors, {"a": 0.5, "b": 2.0})
    for name, tensor in merge(base, {"both": together}, {"both": 1.0}).items():
        torch.testing.assert_close(tensor, apart[name])


def test_merging_refuses_what_does_not_fit():
    base, vector = toy(0), toy_vector(1, toy(0))
    with pytest.raises(InputError, match="belongs to base"):
        merge(toy(5), {"a": vector}, {"a": 1.0})
    for eta, named in (
        ({"z": 1.0}, "unknown preference 'z'"),
        ({"a": math.nan}, "finite"),
        ({"a": math.inf}, "finite"),
    ):
        with pytest.raises(InputError, match=named):
            merge(base, {"a": vector}, eta)
    extra = vector_from_state({"x": torch.ones(2)}, preference="p", base_fingerprint=fingerprint(base))
    with pytest.raises(InputError, match="'x', which the base does not have"):
        merge(base, {"a": extra}, {"a": 1.0})
    misshapen = vector_from_state({"w": torch.ones(4, 5)}, preference="p", base_fingerprint=fingerprint(base))
    with pytest.raises(InputError, match=r"'w' has shape \(4, 5\), in the base \(5, 4\)"):
        merge(base, {"a": misshapen}, {"a": 1.0})
    half = toy(0, torch.float16)
    with pytest.raises(InputError, match="infinite or NaN"):
        merge(half, {"a": toy_vector(1, half)}, {"a": 1e30})


def test_reward_soup():
    base = toy(0)
    deltas = {"a": toy_vector(1, base), "b": toy_vector(2, base)}
    soup = reward_soup(deltas, {"a": 0.25, "b": 0.75}, preference="soup")
    torch.testing.assert_close(soup.dense("w"), 0.25 * deltas["a"].dense("w") + 0.75 * deltas["b"].dense("w"))
    for weights in ({"a": 0.5, "b": 0.6}, {"a": -0.5, "b": 1.5}):
        with pytest.raises(InputError, match="convex combination"):
            reward_soup(deltas, weights, preference="soup")


@settings(max_examples=40)
@given(st.floats(0.01, 1), st.integers(0, 5))
def test_the_threshold_is_that_of_a_sort(density, seed):
    vector = toy_vector(seed, toy(0))
    magnitudes = torch.cat([vector.dense(name).flatten() for name in vector.names()]).abs().sort(descending=True)[0]
    wanted = math.ceil(density * len(magnitudes))
    assert magnitude_threshold(vector, density) == magnitudes[wanted - 1].item()
    kept = keep_largest(vector, density)
    assert sum(int((kept.dense(name) != 0).sum()) for name in kept.names()) == wanted
    for name in kept.names():
        dense = kept.dense(name)
        assert torch.equal(dense[dense != 0], vector.dense(name)[dense != 0])


def test_dare_keeps_the_expectation_and_is_reproducible():
    delta = {"w": torch.ones(400, 300), "v": torch.ones(200, 300)}
    vector = vector_from_state(delta, preference="p", base_fingerprint="blake3:0")
    dropped = dare(vector, 0.3, seed=1)
    numbers = dropped.dense("w")
    assert numbers.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert numbers.mean().item() == pytest.approx(1.0, abs=0.02)
    assert dare(vector, 0.3, seed=1).digest() == dropped.digest()
    assert dare(vector, 0.3, seed=2).digest() != dropped.digest()
    alone = dare(vector_from_state({"v": delta["v"]}, preference="p", base_fingerprint="blake3:0"), 0.3, seed=1)
    assert torch.equal(alone.dense("v"), dropped.dense("v"))


def test_ties_by_hand():
    """Trim to the 2 largest of 4, elect the sign of the sum, average those that agree."""
    rows = {"a": [4.0, 3.0, 0.1, 0.2], "b": [-1.0, 5.0, 2.0, 0.1], "c": [-2.0, -9.0, 0.1, 0.3]}
    vectors = {
        key: vector_from_state({"w": torch.tensor(row)}, preference=key, base_fingerprint="blake3:0")
        for key, row in rows.items()
    }
    merged = ties(vectors, dict.fromkeys("abc", 1.0), density=0.5, preference="ties")
    # trimmed: a = [4, 3, 0, 0], b = [0, 5, 2, 0], c = [-2, -9, 0, 0]; signs + - + 0
    assert merged.dense("w").tolist() == [4.0, -9.0, 2.0, 0.0]
    weighted = ties(vectors, {"a": 1.0, "b": 1.0, "c": 0.5}, density=0.5, preference="ties")
    assert weighted.dense("w").tolist() == [4.0, 4.0, 2.0, 0.0]  # now a and b outvote c on the second number
    assert merged.info.recipe["method"] == "ties"


@pytest.mark.parametrize("density", [0, -1, 1.1, math.nan])
def test_bad_densities_are_refused(density):
    vector = toy_vector(1, toy(0))
    for method in (keep_largest, lambda v, d: dare(v, d, seed=0)):
        with pytest.raises(InputError, match="density"):
            method(vector, density)


def test_vectors_of_two_bases_do_not_combine():
    vectors = {"a": toy_vector(1, toy(0)), "b": toy_vector(2, toy(1))}
    for method in (
        lambda: combine(vectors, {"a": 1.0, "b": 1.0}, preference="p"),
        lambda: ties(vectors, {"a": 1.0, "b": 1.0}, density=0.5, preference="p"),
    ):
        with pytest.raises(InputError, match="is of base"):
            method()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_pefts_ties_on_one_tensor(density):
    """PEFT trims tensor by tensor where the paper and we trim the whole vector: on one tensor that is the same."""
    tensors = [torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    vectors = {
        key: vector_from_state({"w": tensor}, preference=key, base_fingerprint="blake3:0")
        for key, tensor in zip("abc", tensors, strict=True)
    }
    ours = ties(vectors, dict.fromkeys("abc", 1.0), density=density, preference="ties")
    torch.testing.assert_close(ours.dense("w"), merge_utils.ties(tensors, torch.ones(3), density))

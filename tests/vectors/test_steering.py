"""Steering: each row as if the model had been merged for it alone."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import Full, Steering, checkpoint_state, fingerprint, merge, to_dtype, to_low_rank

DENSE = ["llama", "mistral", "qwen3", "gemma", "gemma3_text", "opt", "phi3"]
ROWS = [{"a": 1.0, "b": -0.5}, {"a": 0.3}, {}, {"b": 0.8}]


def logits_of_merged(model, vectors, coefficients, tokens):
    merged = copy.deepcopy(model)
    state = checkpoint_state(merged)
    with torch.no_grad():
        for name, tensor in merge(state, vectors, coefficients).items():
            state[name].copy_(tensor)
        return merged(tokens).logits


@pytest.fixture
def low_rank(random_vector):
    """Two vectors of rank 3 that change every parameter: matrices by factors, norms and biases in full."""
    return lambda model: {
        key: to_low_rank(random_vector(model, seed), rank=3) for seed, key in enumerate("ab", start=1)
    }


@pytest.mark.parametrize("family", DENSE)
def test_each_row_has_its_own_coefficients(family, tiny_model, low_rank, tokens):
    model = tiny_model(family)
    vectors = low_rank(model)
    with Steering(model, vectors) as steering, torch.no_grad():
        steering.set_coefficients(ROWS)
        steered = model(tokens).logits
    for row, coefficients in enumerate(ROWS):
        merged = logits_of_merged(model, vectors, coefficients, tokens[row : row + 1])
        torch.testing.assert_close(steered[row : row + 1], merged, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_detached_and_unsteered_models_are_the_base_bit_for_bit(family, tiny_model, low_rank, tokens):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(tokens).logits
        steering = Steering(model, low_rank(model))
        assert torch.equal(model(tokens).logits, before)
        steering.set_coefficients({"a": 1.0})
        assert not torch.equal(model(tokens).logits, before)
        steering.detach()
        assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_generation_with_a_cache(tiny_model, low_rank, tokens):
    model = tiny_model("llama")
    vectors = low_rank(model)
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    with Steering(model, vectors) as steering:
        steering.set_coefficients(ROWS)
        together = model.generate(tokens, **options)
        for row, coefficients in enumerate(ROWS):
            steering.set_coefficients(coefficients)
            assert torch.equal(model.generate(tokens[row : row + 1], **options), together[row : row + 1])


def test_a_packed_batch_is_steered_by_token(tiny_model, low_rank, tokens):
    model = tiny_model("qwen3")
    with Steering(model, low_rank(model)) as steering, torch.no_grad():
        steering.set_coefficients(ROWS)
        by_row = model(tokens).logits
        by_token = steering.coefficients.repeat_interleave(tokens.shape[1], dim=0)
        assert by_token.shape == (tokens.numel(), 2)
        steering.set_coefficients(by_token)
        torch.testing.assert_close(model(tokens).logits, by_row)


def test_by_token_is_refused_where_a_layer_has_lost_the_order_of_tokens(tiny_model, low_rank, tokens):
    model = tiny_model("gemma3_text")
    with Steering(model, low_rank(model)) as steering:
        steering.set_coefficients(torch.ones(tokens.numel(), 2))
        with pytest.raises(InputError, match="40 rows of coefficients do not fit"):
            model(tokens)


def test_what_does_not_see_the_batch_is_refused(tiny_model, random_vector):
    model = tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    for part, named in (("wpe", "does not see the rows"), ("attn.c_attn", "cannot be steered")):
        with pytest.raises(InputError, match=named):
            Steering(model, {"a": to_low_rank(random_vector(model, 1, only=part), rank=3)})


def test_gradients_pass_through(tiny_model, low_rank, tokens):
    """An attack needs the gradient of a steered model's inputs; inference mode before must not spoil it."""
    model = tiny_model("llama").requires_grad_(False)
    vectors = low_rank(model)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    with Steering(model, {key: to_low_rank(vector, rank=3) for key, vector in vectors.items()}) as steering:
        steering.set_coefficients(ROWS)
        with torch.inference_mode():
            model(inputs_embeds=embedded)
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)
    for row, coefficients in enumerate(ROWS):
        merged = copy.deepcopy(model)
        state = checkpoint_state(merged)
        for name, tensor in merge(state, vectors, coefficients).items():
            state[name].copy_(tensor)
        own = embedded[row : row + 1].detach().requires_grad_()
        (expected,) = torch.autograd.grad(merged(inputs_embeds=own).logits.square().sum(), own)
        torch.testing.assert_close(gradient[row : row + 1], expected, atol=1e-2, rtol=1e-3)


def test_full_matrices_are_shortened_and_the_error_is_stated(tiny_model, random_vector, tokens):
    model = tiny_model("llama")
    vectors = {"a": random_vector(model, 1)}
    with pytest.raises(InputError, match="full form; give rank"):
        Steering(model, vectors)
    with Steering(model, vectors, rank=8) as steering, torch.no_grad():
        steering.set_coefficients({"a": 0.5})
        shortened = model(tokens).logits
    used = to_low_rank(vectors["a"], rank=8)
    table = "model.embed_tokens.weight"  # a lookup: steered exactly, whatever its rank
    used = used.replace({**used.entries, table: vectors["a"].entry(table)})
    changed = sum((vectors["a"].dense(name) - used.dense(name)).square().sum() for name in used.names())
    everything = sum(vectors["a"].dense(name).square().sum() for name in used.names())
    assert steering.errors["a"] == pytest.approx(float(changed / everything) ** 0.5, rel=1e-4)
    merged = logits_of_merged(model, {"a": used}, {"a": 0.5}, tokens)
    torch.testing.assert_close(shortened, merged, atol=5e-5, rtol=1e-4)
    with Steering(model, vectors, energy=1.0) as steering, torch.no_grad():
        steering.set_coefficients({"a": 0.5})
        assert steering.errors["a"] < 1e-6
        steered = model(tokens).logits
    torch.testing.assert_close(steered, logits_of_merged(model, vectors, {"a": 0.5}, tokens), atol=5e-5, rtol=1e-4)


def test_a_mixture_of_experts(tiny_model, random_vector, tokens):
    """Attention, norms and embeddings are steered; fused experts and the router are refused by name."""
    model = tiny_model("mixtral")
    attention = {"a": to_low_rank(random_vector(model, 1, only="self_attn"), rank=3)}
    with Steering(model, attention) as steering, torch.no_grad():
        steering.set_coefficients([{"a": 1.0}, {}, {"a": -1.0}, {"a": 0.2}])
        steered = model(tokens).logits
    for row, eta in enumerate([1.0, 0.0, -1.0, 0.2]):
        merged = logits_of_merged(model, attention, {"a": eta}, tokens[row : row + 1])
        torch.testing.assert_close(steered[row : row + 1], merged, atol=5e-5, rtol=1e-4)
    for part, named in (("experts.1.w2", "fused into"), ("gate", "cannot be steered")):
        vectors = {"a": to_low_rank(random_vector(model, 1, only=part), rank=3)}
        with pytest.raises(InputError, match=named):
            Steering(model, vectors)
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_bf16_models(tiny_model, random_vector, tokens):
    model = tiny_model("llama").bfloat16()
    vectors = {"a": to_dtype(to_low_rank(random_vector(model, 1), rank=3), torch.bfloat16)}
    with Steering(model, vectors) as steering, torch.no_grad():
        steering.set_coefficients({"a": 1.0})
        steered = model(tokens).logits.float()
    exact = copy.deepcopy(model).float()
    moved = {"a": vectors["a"].replace(base_fingerprint=fingerprint(exact))}
    exact_logits = logits_of_merged(exact, moved, {"a": 1.0}, tokens)
    base_logits = exact(tokens).logits
    assert (steered - exact_logits).norm() < 0.02 * exact_logits.norm() < 0.5 * (exact_logits - base_logits).norm()


def test_layers_that_share_an_input_share_one_product(tiny_model, random_vector, tokens):
    """Per layer q, k, v are one product with A, gate and up one, o and down one each."""
    model = tiny_model("llama")
    vectors = {key: to_low_rank(random_vector(model, i, only="proj.weight"), rank=3) for i, key in enumerate("ab")}
    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Steering(model, vectors) as steering, torch.no_grad(), Counting():
        steering.set_coefficients({"a": 1.0})
        model(tokens)
    assert calls["aten.addmm_.default"] == 2 * 7
    assert calls["aten.mul_.Tensor"] == 2 * 4


@pytest.mark.parametrize(
    ("coefficients", "named"),
    [
        ({"c": 1.0}, "unknown"),
        ({"a": float("nan")}, "finite"),
        ([{"a": 1.0}, {"b": float("inf")}], "finite"),
        (torch.zeros(4, 3), r"expected \(rows, 2\), columns a, b"),
        (torch.full((4, 2), float("nan")), "finite"),
        ([], "shape"),
    ],
)
def test_bad_coefficients_are_refused(coefficients, named, tiny_model, low_rank):
    model = tiny_model("llama")
    with Steering(model, low_rank(model)) as steering, pytest.raises(InputError, match=named):
        steering.set_coefficients(coefficients)


def test_rows_must_fit_the_batch(tiny_model, low_rank, tokens):
    model = tiny_model("llama")
    with Steering(model, low_rank(model)) as steering:
        steering.set_coefficients(ROWS[:3])
        with pytest.raises(InputError, match="3 rows of coefficients do not fit"):
            model(tokens)


def test_what_does_not_fit_is_refused(tiny_model, low_rank, random_vector):
    model, other = tiny_model("llama"), tiny_model("llama", seed=5)
    vectors = low_rank(model)
    with pytest.raises(InputError, match="belongs to base"):
        Steering(other, vectors)
    steering = Steering(model, vectors)
    with pytest.raises(InputError, match="steered already"):
        Steering(model, vectors)
    steering.detach()
    poisoned = vectors["a"].dense("model.norm.weight")
    poisoned[3] = float("nan")
    entries = {**vectors["a"].entries, "model.norm.weight": Full(poisoned)}
    with pytest.raises(InputError, match=r"'model\.norm\.weight' holds NaN"):
        Steering(model, {"a": vectors["a"].replace(entries)})
    short = tiny_model("llama", num_hidden_layers=1)
    moved = {key: vector.replace(base_fingerprint=fingerprint(short)) for key, vector in vectors.items()}
    with pytest.raises(InputError, match=r"layers\.1\..*which the model does not have"):
        Steering(short, moved, base_fingerprint=fingerprint(short))

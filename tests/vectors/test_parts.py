"""A vector taken apart: nothing is lost, and a model cannot tell equal parts from the whole."""

import copy

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    LiveModel,
    Steering,
    depth_profile,
    load_vector,
    merge,
    save_vector,
    split,
    to_int8,
    to_low_rank,
)
from prefvec_ray.vectors.checkpoint import checkpoint_state

FAMILIES = ["llama", "gemma3_text", "opt", "gpt2", "phi3", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["depth:2", "module"])
def test_parts_sum_to_the_vector_number_for_number(family, by, tiny_model, random_vector):
    vector = random_vector(tiny_model(family), 0)
    parts = split(vector, by)
    assert list(parts) == (["depth1of2", "depth2of2"] if by == "depth:2" else ["attention", "mlp", "other"])
    names = [name for part in parts.values() for name in part.names()]
    assert sorted(names) == vector.names(), "each parameter is in one part"
    assert all(torch.equal(part.dense(n), vector.dense(n)) for part in parts.values() for n in part.names())
    for label, part in parts.items():
        assert part.info.parents == {"whole": vector.digest()}
        assert part.info.preference == vector.info.preference
        assert (part.info.recipe["part"], part.info.recipe["parts"]) == (label, list(parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_where_they_belong(family, tiny_model, random_vector):
    vector = random_vector(tiny_model(family), 0)
    first, last = split(vector, "depth:2").values()
    assert any("embed" in n or "wte" in n for n in first.names())
    assert not any("layers.1." in n or "h.1." in n for n in first.names())
    assert not any("layers.0." in n or "h.0." in n for n in last.names())
    modules = split(vector, "module")
    assert all("attn" in n and "norm" not in n and "ln" not in n for n in modules["attention"].names())
    matrices = {n for n in vector.names() if len(vector.shape(n)) > 1}
    inside = {n for n in matrices if "embed" not in n and "head" not in n and "wte" not in n and "wpe" not in n}
    assert inside <= {*modules["attention"].names(), *modules["mlp"].names()}


def test_parts_at_one_coefficient_are_the_whole_in_both_modes(tiny_model, random_vector, tokens):
    """Merged, bit for bit, since each number comes from one part. Steered up to the order of sums."""
    model = tiny_model("llama")
    vector = to_low_rank(random_vector(model, 0, scale=0.01), rank=4)
    parts = split(vector, "depth:2")
    profile = dict(zip(parts, [0.3, -0.8], strict=True))
    state = checkpoint_state(model)
    whole = merge(state, {"p": vector}, {"p": 0.7})
    assert all(torch.equal(t, whole[n]) for n, t in merge(state, parts, dict.fromkeys(parts, 0.7)).items())
    live = LiveModel(copy.deepcopy(model), parts)
    with torch.no_grad():
        live.set_coefficients(profile)
        merged = live.model(tokens).logits
        with Steering(model, parts) as steering:
            steering.set_coefficients([{}, profile, dict.fromkeys(parts, 0.7), profile])
            rows = model(tokens).logits
        torch.testing.assert_close(rows[[1, 3]], merged[[1, 3]], atol=2e-5, rtol=1e-5)
        with Steering(model, {"p": vector}) as steering:
            steering.set_coefficients({"p": 0.7})
            torch.testing.assert_close(rows[2], model(tokens).logits[2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [to_int8, lambda vector: to_low_rank(vector, rank=2)])
def test_parts_keep_the_form_and_are_files_like_any(form, tiny_model, random_vector, tmp_path):
    vector = form(random_vector(tiny_model("llama"), 0))
    for label, part in split(vector, "module").items():
        save_vector(part, tmp_path / label)
        loaded = load_vector(tmp_path / label)
        assert loaded.info == part.info
        assert loaded.digest() == part.digest()
        assert [type(loaded.entry(n)) for n in loaded.names()] == [type(vector.entry(n)) for n in loaded.names()]


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("depth:3", "changes 2 layers; give at most as many parts"),
        ("depth:1", "expected depth:N with 2 to 99 parts"),
        ("depth:x", "expected depth:N with 2 to 99 parts"),
        ("layers", "expected depth:N, such as depth:3, or module"),
    ],
)
def test_what_cannot_be_split(by, message, tiny_model, random_vector):
    with pytest.raises(InputError, match=message):
        split(random_vector(tiny_model("llama"), 0), by)


def test_a_part_is_not_split_again_and_one_part_is_none(tiny_model, random_vector):
    vector = random_vector(tiny_model("llama"), 0)
    with pytest.raises(InputError, match="is a part of a vector already"):
        split(split(vector, "module")["mlp"], "depth:2")
    with pytest.raises(InputError, match="all of 'p0' is in attention"):
        split(random_vector(tiny_model("llama"), 0, only="self_attn"), "module")


def test_a_profile_has_mean_one():
    assert depth_profile(3, 0.5) == [0.5, 1.0, 1.5]
    assert depth_profile(4, 0.0) == [1.0] * 4
    assert sum(depth_profile(5, -0.7)) == pytest.approx(5)

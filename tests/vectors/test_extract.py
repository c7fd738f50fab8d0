"""phi = theta+ - theta-, from deltas and from whole models."""

import copy
import warnings

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    LowRank,
    PrecisionWarning,
    checkpoint_state,
    fingerprint,
    subtract,
    to_low_rank,
    vector_from_checkpoints,
    vector_from_state,
)


def moved(model, seed, scale=0.01):
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in checkpoint_state(other).values():
            tensor += torch.randn_like(tensor) * scale
    return other


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "mixtral"])
def test_deltas_and_whole_models_give_the_same_phi(family, tiny_model, tmp_path):
    base = tiny_model(family)
    plus, minus = moved(base, 1), moved(base, 2)
    for name, model in (("base", base), ("plus", plus), ("minus", minus)):
        model.save_pretrained(tmp_path / name, max_shard_size="30KB")
    deltas = [
        vector_from_checkpoints(model, base, base=base, preference=sign, dtype=torch.float32)
        for model, sign in ((plus, "helpful+"), (minus, "helpful-"))
    ]
    phi = subtract(*deltas, preference="helpful", dtype=torch.float32)
    folders = [tmp_path / name for name in ("plus", "minus", "base")]
    direct = vector_from_checkpoints(*folders[:2], base=folders[2], preference="helpful", dtype=torch.float32)
    assert phi.info.base_fingerprint == direct.info.base_fingerprint == fingerprint(base)
    exact = {name: t.double() - checkpoint_state(minus)[name].double() for name, t in checkpoint_state(plus).items()}
    assert phi.names() == direct.names() == sorted(exact)
    for name in phi.names():
        assert torch.equal(direct.dense(name), exact[name].float())
        torch.testing.assert_close(phi.dense(name).double(), exact[name], atol=1e-7, rtol=0)
    assert phi.info.parents == {"positive": deltas[0].digest(), "negative": deltas[1].digest()}


def vector(delta, preference="helpful+", base="blake3:0", **options):
    return vector_from_state(delta, preference=preference, base_fingerprint=base, **options)


def test_parameters_that_did_not_change_are_left_out():
    plus = vector({"a": torch.ones(3), "b": torch.ones(2), "same": torch.ones(4), "zero": torch.zeros(5)})
    minus = vector({"b": torch.ones(2) * 3, "c": torch.ones(2), "same": torch.ones(4)}, "helpful-")
    phi = subtract(plus, minus, preference="helpful", dtype=torch.float32)
    assert "zero" not in plus
    assert {name: phi.dense(name).tolist() for name in phi.names()} == {"a": [1] * 3, "b": [-2] * 2, "c": [-1] * 2}


def test_lineage_is_kept():
    plus = vector({"a": torch.ones(3)}, recipe={"beta": 0.1}, data_digest="blake3:d")
    minus = vector({"a": -torch.ones(3)}, "helpful-", recipe={"beta": 0.2}, data_digest="blake3:d")
    phi = subtract(plus, minus, preference="helpful")
    assert phi.info.recipe == {"positive": {"beta": 0.1}, "negative": {"beta": 0.2}}
    assert phi.info.data_digest == "blake3:d"
    other = vector({"a": -torch.ones(3)}, "helpful-", data_digest="blake3:e")
    phi = subtract(plus, other, preference="helpful")
    assert phi.info.data_digest == ""
    assert phi.info.recipe["negative"] == {"data_digest": "blake3:e"}


def test_two_low_rank_deltas_stay_exact():
    plus, minus = (to_low_rank(vector({"w": torch.randn(8, 6)}), rank=2) for _ in range(2))
    phi = subtract(plus, minus, preference="helpful", dtype=torch.float32)
    assert isinstance(phi.entry("w"), LowRank)
    assert phi.info.form == "low-rank"
    torch.testing.assert_close(phi.dense("w"), plus.dense("w") - minus.dense("w"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storing_states_its_error(dtype):
    delta = {"w": torch.randn(64, 64) * 0.01, "n": torch.randn(64)}
    stored = vector(delta, dtype=dtype)
    exact = vector(delta)
    lost = sum((stored.dense(n).double() - exact.dense(n).double()).square().sum() for n in delta)
    total = sum(exact.dense(n).double().square().sum() for n in delta)
    assert stored.info.precision["relative_error"] == pytest.approx(float((lost / total).sqrt()), abs=1e-12)
    if dtype == torch.bfloat16:
        assert 0.0012 < stored.info.precision["relative_error"] < 0.0022


@pytest.mark.parametrize(
    ("delta", "options", "named"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, {}, "'a' of 'helpful.' holds NaN or infinity"),
        ({"a": torch.tensor([1.0, float("inf")])}, {}, "'a' of 'helpful.' holds NaN or infinity"),
        ({"a": torch.tensor([1, 2])}, {}, "'a' is torch.int64"),
        ({"a": torch.zeros(3)}, {}, "changes no parameter"),
        ({}, {}, "changes no parameter"),
        ({"a": torch.tensor([1e6])}, {"dtype": torch.float16}, "'a' of 'helpful.' overflows float16"),
        ({"a": torch.ones(3)}, {"dtype": torch.int8}, "cannot store a vector in torch.int8"),
    ],
)
def test_bad_deltas_are_refused(delta, options, named):
    with pytest.raises(InputError, match=named):
        vector(delta, **options)


def test_tied_names_are_refused():
    shared = torch.ones(4, 2)
    with pytest.raises(InputError, match="'embed' and 'head' are one tied tensor"):
        vector({"head": shared, "embed": shared})


def test_runs_that_do_not_belong_together_are_refused():
    plus = vector({"a": torch.ones(3)})
    with pytest.raises(InputError, match="is of base"):
        subtract(plus, vector({"a": torch.ones(3)}, base="blake3:1"), preference="p")
    with pytest.raises(InputError, match=r"'a' is \(3,\)"):
        subtract(plus, vector({"a": torch.ones(4)}), preference="p")
    with pytest.raises(InputError, match="two runs are equal"):
        subtract(plus, plus, preference="p")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "model.norm.weight"}, "lacks 'model.norm.weight'"),
        (lambda state: state | {"extra": torch.ones(2)}, "has 'extra'"),
        (lambda state: state | {"model.norm.weight": torch.ones(5)}, r"'model.norm.weight' .* is \(5,\)"),
        (lambda state: state | {"model.norm.weight": torch.full((32,), float("nan"))}, "NaN"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_models_that_do_not_fit_the_base_are_refused(which, change, named, tiny_model):
    base = tiny_model("llama")
    runs = [checkpoint_state(moved(base, 1)), checkpoint_state(moved(base, 2))]
    runs[which] = change(runs[which])
    with pytest.raises(InputError, match=named):
        vector_from_checkpoints(*runs, base=base, preference="p")


def test_bf16_sources_are_reported_and_warned_about(tiny_model):
    base = tiny_model("llama", hidden_size=64)
    runs = [moved(base, seed, scale=2e-4) for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = vector_from_checkpoints(*runs, base=base, preference="p", dtype=torch.float32)
    assert "rounding" not in exact.info.precision
    rounded = [run.bfloat16() for run in runs]
    with pytest.warns(PrecisionWarning, match="taken from bfloat16 checkpoints"):
        coarse = vector_from_checkpoints(*rounded, base=base, preference="p", dtype=torch.float32)
    fine, rough = [
        torch.cat([v.dense(n).flatten() if n in v else torch.zeros(exact.shape(n)).flatten() for n in exact.names()])
        for v in (exact, coarse)
    ]
    truth = torch.nn.functional.cosine_similarity(fine, rough, dim=0).item()
    report = coarse.info.precision["rounding"]
    assert isinstance(report, dict)
    assert report["source_dtype"] == "bfloat16"
    assert report["expected_cosine"] == pytest.approx(truth, abs=0.03)
    with pytest.warns(PrecisionWarning, match="taken from bfloat16"):
        deltas = [vector_from_checkpoints(r, base, base=base, preference="d", dtype=torch.float32) for r in rounded]
    with pytest.warns(PrecisionWarning, match="keep the deltas in fp32"):
        subtract(*deltas, preference="p")

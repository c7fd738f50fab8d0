"""Re-merging a live model in place: exact, the same bits on every path, refused where it would be wrong."""

import copy
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    Checkpoint,
    Entry,
    Full,
    Int8,
    LowRank,
    PreferenceVector,
    VectorInfo,
    checkpoint_state,
    fingerprint,
    load_vector,
    save_vector,
    vector_from_state,
)
from prefvec_ray.vectors._native import merge_library
from prefvec_ray.vectors.fused import FusedMerge, Segment, coalesced, packed
from prefvec_ray.vectors.live import LiveModel

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
CONFIGS = {
    "llama": functools.partial(transformers.LlamaConfig, tie_word_embeddings=False),
    "gemma": functools.partial(transformers.GemmaConfig, head_dim=8),  # ties its embeddings
    "phi3": transformers.Phi3Config,  # qkv and gate_up in one weight
    "qwen3_moe": functools.partial(transformers.Qwen3MoeConfig, **MOE),  # experts fused while loading
}


def tiny(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](**SIZES, **HEADS))
    return model.to(dtype).eval()


def some_vector(model: torch.nn.Module, preference: str, form: str = "bfloat16", seed: int = 1) -> PreferenceVector:
    """Random numbers of about half the weights' size, in any of the stored forms."""
    torch.manual_seed(seed)
    delta = {name: torch.randn(t.shape) * 0.01 for name, t in checkpoint_state(model).items()}
    base = fingerprint(model)
    if form in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, form)
        return vector_from_state(delta, preference=preference, base_fingerprint=base, dtype=dtype)
    entries: dict[str, Entry] = {}
    for name, phi in delta.items():
        if phi.dim() < 2:
            entries[name] = Full(phi)
        elif form == "int8":
            scale = phi.abs().amax(-1) / 127
            entries[name] = Int8((phi / scale.unsqueeze(-1)).round().to(torch.int8), scale)
        else:
            entries[name] = LowRank(torch.randn(3, phi.shape[1]) * 0.1, torch.randn(phi.shape[0], 3) * 0.1)
    info = VectorInfo(
        preference=preference,
        form="low-rank" if form == "low-rank" else "full",
        dtype="int8" if form == "int8" else "float32",
        base_fingerprint=base,
    )
    return PreferenceVector(info, entries)


def exact_sum(base: Tensor, phis: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    """float64 all the way and one rounding."""
    return sum((eta * phi.double() for eta, phi in phis), base.double()).to(dtype)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_and_logits_are_those_of_a_float64_sum(kind: str) -> None:
    model = tiny(kind, torch.float32)
    base = {name: tensor.clone() for name, tensor in checkpoint_state(model).items()}
    vectors = {"helpful": some_vector(model, "helpful"), "harmless": some_vector(model, "harmless", seed=2)}
    reference = copy.deepcopy(model).double()
    reference.set_experts_implementation("eager")  # the grouped kernel has no float64
    for name, tensor in checkpoint_state(reference).items():
        phis = [(0.7, vectors["helpful"].dense(name)), (-1.3, vectors["harmless"].dense(name))]
        tensor.copy_(exact_sum(base[name], phis, torch.float64))

    live = LiveModel(model, vectors)
    live.set_coefficients({"harmless": -1.3, "helpful": 0.7})

    tokens = torch.arange(1, 13).view(2, 6)
    with torch.inference_mode():
        logits, exact = live.model(tokens).logits, reference(tokens).logits
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)
    live.set_coefficients({})
    for name, tensor in checkpoint_state(model).items():
        assert torch.equal(tensor, base[name]), name
    assert fingerprint(model) == live.base_fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_and_torch_paths_give_the_same_bits(dtype: torch.dtype) -> None:
    if merge_library() is None:
        pytest.skip("no C++ compiler here: there is only one path")
    forms = ["bfloat16", "float16", "float32", "int8", "low-rank"]
    models = [tiny(dtype=dtype), tiny(dtype=dtype)]
    vectors = {form: some_vector(models[0], form, form, seed) for seed, form in enumerate(forms)}
    etas = dict(zip(forms, [0.3, -1.7, 1e-3, 2.5, 0.9], strict=True))
    for model, native in zip(models, [True, False], strict=True):
        LiveModel(model, vectors, native=native, threads=3).set_coefficients(etas)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    assert not torch.equal(models[0].lm_head.weight, tiny(dtype=dtype).lm_head.weight)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 65536, 300_001])
def test_every_element_of_odd_sizes_is_written_and_rounded_to_even(size: int, native: bool) -> None:
    torch.manual_seed(size)
    base, phi = torch.randn(size).bfloat16(), torch.randn(size).bfloat16()
    out = torch.full((size,), 7.0, dtype=torch.bfloat16)
    merge = FusedMerge([Segment("x", out, base, ((0, Full(phi)),))], native=native, threads=2)
    assert merge.run([0.37]) is None
    eta = torch.tensor(0.37)
    assert torch.equal(out, (base.float() + eta * phi.float()).bfloat16())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs_for_every_kind_of_number(dtype: torch.dtype, native: bool) -> None:
    """Subnormals, ties, signed zeros, overflow: random fp32 bits rounded, and every bit pattern of the dtype kept."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + (1 << 15)
    wide = torch.cat([bits, ties]).view(torch.float32)
    for base in (wide[wide.isfinite()], torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)):
        base = base[base.isfinite()]
        out = torch.empty(len(base), dtype=dtype)
        nothing = Full(torch.ones(len(base)))
        FusedMerge([Segment("x", out, base, ((0, nothing),))], native=native).run([1e-60])  # 0 in fp32
        assert torch.equal(out.view(torch.int16), base.to(dtype).view(torch.int16))


@pytest.mark.parametrize("native", [True, False])
def test_the_order_of_vectors_makes_no_difference(native: bool) -> None:
    first, second = tiny(), tiny()
    vectors = {name: some_vector(first, name, "float32", seed) for seed, name in enumerate("abc")}
    LiveModel(first, vectors, native=native).set_coefficients({"a": 0.1, "b": 0.2, "c": -0.7})
    backwards = dict(reversed(vectors.items()))
    LiveModel(second, backwards, native=native).set_coefficients({"c": -0.7, "b": 0.2, "a": 0.1})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_coefficients_are_absolute_and_do_not_drift() -> None:
    model = tiny()
    live = LiveModel(model, {"helpful": some_vector(model, "helpful")})
    live.set_coefficients({"helpful": 0.5})
    once = [p.clone() for p in model.parameters()]
    for step in range(20):
        live.set_coefficients({"helpful": step / 10})
    live.set_coefficients({"helpful": 0.5})
    assert all(torch.equal(a, b) for a, b in zip(once, model.parameters(), strict=True))
    assert live.coefficients == {"helpful": 0.5}


def test_parameters_share_one_flat_buffer_and_tied_weights_stay_tied() -> None:
    model = tiny("gemma")
    live = LiveModel(model, {"helpful": some_vector(model, "helpful")})
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    live.set_coefficients({"helpful": 1.0})
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_base_and_vectors_may_be_the_mapped_files(tmp_path: Path) -> None:
    """Processes of one node then share one copy of them in the page cache; the files stay as they were."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    save_vector(some_vector(tiny("qwen3_moe"), "helpful"), tmp_path / "helpful")
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2)]
    mapped = {"helpful": load_vector(tmp_path / "helpful")}
    shared = LiveModel(models[0], mapped, base=Checkpoint(tmp_path / "base"))
    copied = LiveModel(models[1], mapped)
    for live in (shared, copied):
        live.set_coefficients({"helpful": 0.8})
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert fingerprint(tmp_path / "base") == shared.base_fingerprint
    assert not torch.equal(models[0].lm_head.weight, Checkpoint(tmp_path / "base").tensor("lm_head.weight"))


def test_works_under_inference_mode() -> None:
    outside = tiny()
    with torch.inference_mode():
        for model in (outside, tiny()):
            live = LiveModel(model, {"helpful": some_vector(model, "helpful")}, native=False)
            live.set_coefficients({"helpful": 0.5})
            model(torch.ones(1, 3, dtype=torch.long))
    live.set_coefficients({"helpful": 0.0})
    assert torch.equal(model.lm_head.weight, outside.lm_head.weight) is False
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)


def test_neighbours_in_memory_are_computed_as_one() -> None:
    """What a CUDA device is given. The vector leaves the second tensor out here, so three are left of four."""
    shapes = [(3, 5), (64,), (7,), (2, 2, 4)]
    tensors = [torch.randn(shape) for shape in shapes]
    outs, bases = packed(tensors), packed(tensors)
    phis = packed([tensors[0], tensors[2], tensors[3]])
    terms = [((0, Full(phis[0])),), (), ((0, Full(phis[1])),), ((0, Full(phis[2])),)]
    segments = [Segment(str(i), outs[i], bases[i], terms[i]) for i in range(4)]
    joined = coalesced(segments)
    assert [segment.name for segment in joined] == ["0", "1", "2"]
    FusedMerge(joined, native=False).run([0.5])
    for i, factor in enumerate([1.5, 1.0, 1.5, 1.5]):
        torch.testing.assert_close(outs[i], factor * tensors[i])


def test_a_vector_of_another_base_is_refused() -> None:
    with pytest.raises(InputError, match="belongs to base"):
        LiveModel(tiny(), {"helpful": some_vector(tiny(seed=5), "helpful")})


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"helpfull": 1.0}, "unknown preference 'helpfull'; known: helpful"),
        ({"helpful": float("nan")}, "expected a finite number"),
        ({"helpful": float("-inf")}, "expected a finite number"),
        ({"helpful": 1e300}, "expected a finite number"),
        ({"helpful": "1"}, "expected a finite number"),
        ({"helpful": True}, "expected a finite number"),
    ],
    ids=str,
)
def test_bad_coefficients_are_refused_and_change_nothing(coefficients: dict[str, float], message: str) -> None:
    model = tiny()
    live = LiveModel(model, {"helpful": some_vector(model, "helpful")})
    live.set_coefficients({"helpful": 0.5})
    before = model.lm_head.weight.clone()
    with pytest.raises(InputError, match=message):
        live.set_coefficients(coefficients)
    assert torch.equal(model.lm_head.weight, before)
    assert live.coefficients == {"helpful": 0.5}


@pytest.mark.parametrize("native", [True, False])
def test_overflow_is_refused_and_leaves_the_base(native: bool) -> None:
    model = tiny(dtype=torch.float16)
    base = [p.clone() for p in model.parameters()]
    live = LiveModel(model, {"helpful": some_vector(model, "helpful")}, native=native)
    with pytest.raises(InputError, match="infinite or NaN"):
        live.set_coefficients({"helpful": 1e9})
    assert live.coefficients == {"helpful": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(base, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update({"model.extra.weight": torch.ones(3)}),
            "'model.extra.weight', which the model",
        ),
        (
            lambda d: d.update({"lm_head.weight": torch.ones(96, 31)}),
            r"'lm_head.weight' has shape \(96, 31\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change: object, message: str) -> None:
    model = tiny()
    delta = {"lm_head.weight": torch.ones(96, 32)}
    change(delta)  # type: ignore[operator]
    vector = vector_from_state(delta, preference="helpful", base_fingerprint=fingerprint(model))
    with pytest.raises(InputError, match=message):
        LiveModel(model, {"helpful": vector})


def test_without_a_compiler_there_is_one_warning_and_the_same_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("PREFVEC_NATIVE", raising=False)
    merge_library.cache_clear()
    try:
        model = tiny()
        live = LiveModel(model, {"helpful": some_vector(model, "helpful")})
        live.set_coefficients({"helpful": 1.0})
        assert [record.levelname for record in caplog.records].count("WARNING") == 1
        assert not torch.equal(model.lm_head.weight, tiny().lm_head.weight)
    finally:
        merge_library.cache_clear()


@pytest.mark.slow
def test_processes_that_compile_at_once_all_get_the_library(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    program = "from prefvec_ray.vectors._native import merge_library; assert merge_library() is not None"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PREFVEC_NATIVE": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    [library] = (tmp_path / "prefvec-ray" / "native").iterdir()
    assert library.suffix == ".so"

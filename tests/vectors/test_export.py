"""Exported checkpoints and adapters: the live model's bits, loadable by others, there at once or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    Checkpoint,
    Full,
    Int8,
    LiveModel,
    LowRank,
    PreferenceVector,
    VectorInfo,
    fingerprint,
    save_vector,
    vector_from_state,
)
from prefvec_ray.vectors.export import export_adapter, export_model

ETAS = {"helpful": 0.7, "harmless": -0.4}


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def base(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """The folder of a tiny Llama in bf16."""
    return saved(tiny_model("llama"), tmp_path / "base")


def full_vector(base: Path, preference: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> PreferenceVector:
    torch.manual_seed(seed)
    delta = {name: torch.randn(tensor.shape) * 0.01 for name, tensor in Checkpoint(base).items()}
    return vector_from_state(delta, preference=preference, base_fingerprint=fingerprint(base), dtype=dtype)


def low_rank_vector(base: Path, preference: str, rank: int, only: str = "_proj.weight") -> PreferenceVector:
    torch.manual_seed(rank)
    entries = {
        name: LowRank(torch.randn(rank, tensor.shape[1]) * 0.1, torch.randn(tensor.shape[0], rank) * 0.1)
        for name, tensor in Checkpoint(base).items()
        if name.endswith(only)
    }
    info = VectorInfo(preference=preference, form="low-rank", dtype="float32", base_fingerprint=fingerprint(base))
    return PreferenceVector(info, entries)


def int8_vector(base: Path, preference: str) -> PreferenceVector:
    torch.manual_seed(7)
    entries = {
        name: Int8(torch.randint(-127, 128, tensor.shape, dtype=torch.int8), torch.rand(tensor.shape[:-1]) * 1e-4)
        for name, tensor in Checkpoint(base).items()
        if tensor.dim() == 2
    }
    info = VectorInfo(preference=preference, form="full", dtype="int8", base_fingerprint=fingerprint(base))
    return PreferenceVector(info, entries)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(1, 13).view(2, 6)).logits


def two_vectors(base: Path) -> dict[str, PreferenceVector]:
    return {"helpful": full_vector(base, "helpful", 1), "harmless": full_vector(base, "harmless", 2)}


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3_moe"])
def test_the_export_is_the_live_model_bit_for_bit(tmp_path: Path, tiny_model: Callable[..., Any], family: str) -> None:
    base = saved(tiny_model(family), tmp_path / "base")
    vectors = two_vectors(base)
    export_model(base, vectors, ETAS, tmp_path / "out", max_shard_size="20KB")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    live = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(base), vectors)
    live.set_coefficients(ETAS)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) >= 2
    assert fingerprint(tmp_path / "out") == fingerprint(live.model)
    assert torch.equal(logits(exported), logits(live.model))
    assert not torch.equal(logits(exported), logits(transformers.AutoModelForCausalLM.from_pretrained(base)))


def test_every_stored_form_and_a_missing_entry(tmp_path: Path, base: Path) -> None:
    vectors = {
        "fp16": full_vector(base, "fp16", 3, torch.float16),
        "fp32": full_vector(base, "fp32", 4, torch.float32),
        "int8": int8_vector(base, "int8"),
        "lora": low_rank_vector(base, "lora", 3),
    }
    etas = {"fp16": 0.5, "fp32": -1.0, "int8": 1.5, "lora": 0.25}
    export_model(base, vectors, etas, tmp_path / "out")
    live = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(base), vectors)
    live.set_coefficients(etas)
    assert fingerprint(tmp_path / "out") == fingerprint(live.model)


def test_large_tensors_are_cut_into_chunks_without_a_seam(tmp_path: Path) -> None:
    """Three dimensions, one long dimension, rows over several chunks, a scalar, integers: no model has them all."""
    torch.manual_seed(0)
    shapes = {"stack": (3, 300, 2100), "long": (3_000_017,), "matrix": (2500, 1001), "one": (), "empty": (0, 4)}
    base = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file(base | {"steps": torch.arange(9)}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    delta = {name: torch.randn(shape) for name, shape in shapes.items() if name != "empty"}
    full = vector_from_state(
        delta, preference="a", base_fingerprint=fingerprint(tmp_path / "base"), dtype=torch.float32
    )
    stack = LowRank(torch.randn(3, 2, 2100), torch.randn(3, 300, 2))
    low = PreferenceVector(full.info.model_copy(update={"form": "low-rank"}), {"stack": stack})
    export_model(tmp_path / "base", {"a": full, "b": low}, {"a": 0.5, "b": 2.0}, tmp_path / "out", threads=3)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("long", "matrix", "one"):
        assert torch.equal(out[name], (base[name].float() + delta[name] * 0.5).bfloat16()), name
    expected = base["stack"].float() + delta["stack"] * 0.5 + stack.dense() * 2
    torch.testing.assert_close(out["stack"].float(), expected, rtol=1 / 128, atol=1e-3)
    assert torch.equal(out["steps"], torch.arange(9))
    assert out["empty"].shape == (0, 4)


def test_files_are_laid_out_as_safetensors_does_it(tmp_path: Path, base: Path) -> None:
    out = export_model(base, {}, {}, tmp_path / "out")
    save_file(load_file(out / "model.safetensors"), tmp_path / "same.safetensors", {"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask() & 0o644


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_what_belongs_to_a_model_comes_along(tmp_path: Path, base: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = export_model(
        base,
        two_vectors(base),
        ETAS,
        tmp_path / "out",
        dtype=torch.float16,
        lineage={"helpful": "helpful@3"},
        progress=lambda done, total: seen.append((done, total)),
    )
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16
    card = (out / "README.md").read_text()
    for text in ("base_model: base", "helpful: 0.7", "harmless: -0.4", "helpful@3", fingerprint(base)):
        assert text in card
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in load_file(out / "model.safetensors").values())


def spoiled(vector: PreferenceVector, value: float) -> PreferenceVector:
    entries = {name: Full(vector.dense(name).bfloat16()) for name in vector.names()}
    entries["lm_head.weight"].values[5, 5] = value
    return PreferenceVector(vector.info, entries)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_without_output(tmp_path: Path, value: float, base: Path) -> None:
    with pytest.raises(InputError, match=r"'lm_head\.weight' would hold NaN or infinity"):
        export_model(
            base, {"helpful": spoiled(full_vector(base, "helpful", 1), value)}, {"helpful": 1}, tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_does_not_fit_is_refused_without_output(
    tmp_path: Path, tiny_model: Callable[..., Any], base: Path
) -> None:
    other = saved(tiny_model("llama"), tmp_path / "other", torch.float32)
    vectors, alien = two_vectors(base), {"helpful": full_vector(other, "helpful", 1)}
    with pytest.raises(InputError, match="belongs to base"):
        export_model(base, alien, {"helpful": 1.0}, tmp_path / "out")
    with pytest.raises(InputError, match="unknown preference 'polite'"):
        export_model(base, vectors, {"polite": 1.0}, tmp_path / "out")
    with pytest.raises(InputError, match="base model's own folder"):
        export_model(base, vectors, ETAS, base, overwrite=True)
    with pytest.raises(InputError, match=r"cannot export in torch\.int8"):
        export_model(base, vectors, ETAS, tmp_path / "out", dtype=torch.int8)
    for shape, message in [((3, 3), r"'lm_head\.weight' has shape \(3, 3\)"), ((96, 32), "does not have")]:
        name = "lm_head.weight" if shape == (3, 3) else "lm_foot.weight"
        wrong = vector_from_state({name: torch.ones(shape)}, preference="x", base_fingerprint=fingerprint(base))
        with pytest.raises(InputError, match=message):
            export_model(base, {"x": wrong}, {"x": 1.0}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_a_model(tmp_path: Path, base: Path) -> None:
    vectors = two_vectors(base)
    out = export_model(base, vectors, ETAS, tmp_path / "out")
    first = fingerprint(out)
    with pytest.raises(InputError, match="already exists"):
        export_model(base, vectors, {}, out)
    assert fingerprint(out) == first
    export_model(base, vectors, {}, out, overwrite=True)
    assert fingerprint(out) == fingerprint(base)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(InputError, match="it is not replaced"):
        export_model(base, vectors, {}, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "thesis"]


KILLED = """
import os, signal, sys
from prefvec_ray.vectors.export import export_model
def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
export_model(sys.argv[1], {}, {}, sys.argv[2], max_shard_size="20KB", progress=progress)
"""


def test_a_killed_export_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path, base: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(base), str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    [left] = [path for path in tmp_path.iterdir() if path.name != "base"]
    assert ".partial-" in left.name
    with pytest.raises(InputError):
        Checkpoint(left)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        transformers.AutoModelForCausalLM.from_pretrained(left)
    out = export_model(base, {}, {}, tmp_path / "out")
    assert fingerprint(out) == fingerprint(base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


MEASURED = """
import sys, torch
from prefvec_ray.vectors import export_model, load_vector
torch.set_num_threads(2)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
export_model(sys.argv[1], {}, {}, sys.argv[3])  # warms up what the first call allocates for good
vector, seen = load_vector(sys.argv[2]), []
before = anonymous()
export_model(sys.argv[1], {"x": vector}, {"x": 1.0}, sys.argv[4], progress=lambda done, total: seen.append(anonymous()))
print(max(seen) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages as Linux does")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """128 MB of weights pass through a few megabytes a thread."""
    (tmp_path / "base").mkdir()
    weights = {f"{i}.weight": torch.randn(4096, 2048) for i in range(4)}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    vector = vector_from_state(weights, preference="x", base_fingerprint=fingerprint(tmp_path / "base"))
    save_vector(vector, tmp_path / "x")
    folders = [str(tmp_path / name) for name in ("base", "x", "warm", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *folders], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 32
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["3.weight"], weights["3.weight"] * 2)


def test_an_adapter_is_exact_at_its_coefficients(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    import peft

    base = saved(tiny_model("llama"), tmp_path / "base", torch.float32)
    vectors = {
        "helpful": low_rank_vector(base, "helpful", 3),
        "harmless": low_rank_vector(base, "harmless", 5, only="q_proj.weight"),
        "unused": full_vector(base, "unused", 3),
    }
    out = export_adapter(vectors, ETAS, tmp_path / "adapter", base_model=str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(model, out)
    live = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(base), vectors)
    live.set_coefficients(ETAS)
    torch.testing.assert_close(logits(adapted), logits(live.model), rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload()
    for name, tensor in live.model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_adapter_refuses_what_it_cannot_hold(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    base = saved(tiny_model("qwen3_moe"), tmp_path / "base")
    low, full = low_rank_vector(base, "low", 2, only="q_proj.weight"), full_vector(base, "full", 1)
    experts = low_rank_vector(base, "experts", 2, only="down_proj.weight")
    for vector, message in [(full, "not a low-rank change"), (experts, "not a low-rank change"), (low, "all coeff")]:
        with pytest.raises(InputError, match=message):
            export_adapter({"x": vector}, {"x": 0.0 if vector is low else 1.0}, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


WAITING = """
import pathlib, sys, time
from prefvec_ray.vectors.export import export_model
def progress(done, total):
    pathlib.Path(sys.argv[3]).touch()
    while not pathlib.Path(sys.argv[4]).exists():
        time.sleep(0.01)
export_model(sys.argv[1], {}, {}, sys.argv[2], progress=progress)
"""


def test_of_two_exports_at_once_one_wins_and_neither_disturbs_the_other(tmp_path: Path, base: Path) -> None:
    """The second must not take the first one's folder for one that a killed process left behind."""
    out, started, done = (tmp_path / name for name in ("out", "started", "done"))
    arguments = [str(path) for path in (base, out, started, done)]
    slow = subprocess.Popen([sys.executable, "-c", WAITING, *arguments], stderr=subprocess.PIPE, text=True)
    while not started.exists():
        time.sleep(0.01)
        assert slow.poll() is None
    export_model(base, {}, {}, out)
    [partial] = tmp_path.glob(".out.partial-*")
    assert any(partial.iterdir())
    done.touch()
    assert "appeared meanwhile" in slow.communicate(timeout=60)[1]
    assert fingerprint(out) == fingerprint(base)
    assert not list(tmp_path.glob(".out.partial-*"))

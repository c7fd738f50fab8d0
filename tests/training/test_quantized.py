"""Adapters trained beside a rounded base: the vector belongs to the base as it is, and hardly differs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefvec_ray.artifacts.training import RunResult
from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.likelihood import Margins, token_pairs
from prefvec_ray.preferences import load_preferences
from prefvec_ray.training.quantized import check_quantization
from prefvec_ray.vectors import LiveModel, LowRank, PreferenceVector, fingerprint, load_vector

SCRIPT = Path(__file__).parent / "scripts" / "qlora.py"
APART = Path(sys.prefix) / "qlora"
"""Where `make env` puts bitsandbytes."""


@pytest.fixture(scope="module")
def base(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro world's tokenizer and a Llama with layers of whole blocks of 64."""
    folder = tmp_path_factory.mktemp("quantized") / "base"
    tokenizer = AutoTokenizer.from_pretrained(world_folder / "base")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, world_folder: Path) -> dict[str, Path]:
    """Finished runs over 32 pairs: beside the base as it is, rounded to nf4, and to int8."""
    assert (APART / "bitsandbytes").is_dir(), f"{APART} is not there: run `make env`"
    folder = base.parent
    pairs = load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(32))
    pairs.save_to_disk(folder / "pairs")
    path = os.pathsep.join([str(APART), str(Path(__file__).parents[2])])
    command = [sys.executable, *map(str, (SCRIPT, base, folder / "pairs", folder))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "MatMul8bitLt" not in done.stderr
    return {name: folder / name / "run" for name in ("plain", "nf4", "int8")}


def result(run: Path) -> RunResult:
    return RunResult.model_validate_json((run / "run.json").read_text())


def cosine(a: PreferenceVector, b: PreferenceVector) -> float:
    def dot(x: PreferenceVector, y: PreferenceVector) -> float:
        return sum((x.dense(name) * y.dense(name)).sum().item() for name in x.names())

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


@pytest.mark.parametrize(("kind", "least"), [("nf4", 0.8), ("int8", 0.97)])
def test_the_vector_belongs_to_the_base_as_it_is(runs, base, kind, least):
    plain, vector = (load_vector(runs[name] / "delta") for name in ("plain", kind))
    assert vector.info.base_fingerprint == fingerprint(base)
    assert vector.info.recipe["quantize"] == kind
    assert "quantize" not in plain.info.recipe
    assert least < cosine(vector, plain) < 1 - 1e-6, "it was trained beside other weights"
    factors = [entry.B_OR for entry in vector.entries.values() if isinstance(entry, LowRank)]
    assert len(factors) == len(vector.entries)
    assert any((factor != factor.bfloat16().float()).any() for factor in factors), "its masters were fp32"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_starts_at_the_reference_of_the_rounded_base(runs, kind):
    first = result(runs[kind]).history[0]
    assert first.loss == pytest.approx(math.log(2), abs=1e-3)
    kl = result(runs[kind]).kl
    assert kl is not None
    assert abs(kl) < 0.2, "the answers that measure drift are scored by the rounded base too"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_was_learned_beside_the_rounded_base_holds_on_the_base_as_it_is(runs, base, world_folder, kind):
    """The same pairs' implicit margins, on both."""
    seen = result(runs[kind]).held_out["helpful"].margin
    rows = load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(32))
    pairs = {"helpful": token_pairs(AutoTokenizer.from_pretrained(base), rows.to_list())}
    model = AutoModelForCausalLM.from_pretrained(base)
    live = LiveModel(model, {"helpful": load_vector(runs[kind] / "delta")})
    margins = Margins(model, live.set_coefficients, pairs)
    live.set_coefficients({"helpful": 1.0})
    measured = [value for value in margins.measure()["margin_helpful"] if value is not None]
    merged = sum(measured) / len(measured) * 0.1  # TRL's margin is in units of beta
    assert seen > 0
    assert merged == pytest.approx(seen, rel=0.3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_vector_steers_the_rounded_base_row_by_row(runs, kind):
    """Against phi x added layer by layer, and against the same on the base as it is: rounding moves the base, and what
    the vector changes there is nearly the same."""
    found = json.loads((runs[kind].parent / "steered.json").read_text())
    assert found["base untouched"], "the row with coefficient 0"
    assert found["to expected"] < 1e-4
    assert found["moved"][0] == 0 < found["moved"][1] < found["moved"][2]
    assert 1e-6 < found["effect on both"] < 0.3 * found["effect"]


def test_what_cannot_be_quantized_is_refused(base, world_folder, monkeypatch):
    with pytest.raises(InputError, match="quantize needs method lora, and method is 'full'"):
        check_quantization("nf4", base, "full", sharded=False)
    with pytest.raises(InputError, match="not supported with deepspeed or fsdp"):
        check_quantization("nf4", base, "lora", sharded=True)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed: pip install 'prefvec-ray\[qlora\]'"):
        check_quantization("nf4", base, "lora", sharded=False)
    monkeypatch.syspath_prepend(APART)
    check_quantization("nf4", base, "lora", sharded=False)
    narrow = world_folder / "base"  # 96 wide
    check_quantization("int8", narrow, "lora", sharded=False)
    with pytest.raises(InputError, match=r"blocks of 64 numbers, and rows of \S+ in base \S+ have 96: use int8"):
        check_quantization("nf4", narrow, "lora", sharded=False)
    assert json.loads((narrow / "config.json").read_text())["hidden_size"] == 96

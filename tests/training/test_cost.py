"""What a training is said to cost, against what it takes."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from prefvec_ray.artifacts.training import Method, ReferencePairs
from prefvec_ray.cli.train import run_train
from prefvec_ray.training.cost import Cost, DryRunJob, DryRunResult, _kept, _state, estimate, measure_steps
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.fsdp import PRESETS as FSDP
from prefvec_ray.training.fsdp import fsdp_config
from prefvec_ray.training.lora import lora_config
from prefvec_ray.training.references import ReferenceJob, ScoringTask, write_references
from prefvec_ray.training.train import plan_runs, prepare_data
from prefvec_ray.training.zero import deepspeed_config

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("lora", [False, True])
def test_counts_are_those_of_the_runs(config, lora):
    config = config.model_copy(
        update={"method": "lora", "lora": {"r": 4}} if lora else {"mixed": True, "seeds": [0, 1]}
    )
    prepared = prepare_data(config)
    cost = estimate(config, prepared)

    folder = config.folder / "scored"
    tasks = [
        ScoringTask(target=str(folder / name / part), source=getattr(split, part), pairs=1)
        for name, split in prepared.items()
        for part in ("train", "test")
    ]
    passed = ReferenceJob(base=str(config.base), dpo=config.dpo, method=config.run_method, tasks=tasks)
    write_references(passed, lambda done, total: None)
    references = {
        name: ReferencePairs(train=str(folder / name / "train"), test=str(folder / name / "test"), digest=split.digest)
        for name, split in prepared.items()
    }
    specs = plan_runs(config, references)
    assert cost.runs == len(specs)
    assert cost.scored == sum(split.pairs + split.test_pairs for split in prepared.values())
    first = run_dpo(specs[0], lambda values: None, config.folder / "work")
    assert first is not None
    assert cost.steps == first.steps * len(specs), "both preferences have as many pairs"
    assert cost.pairs == first.pairs * len(specs)
    trained = load_from_disk(specs[0].train[0])
    tokens = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trained]
    assert cost.tokens_a_pair == pytest.approx(sum(tokens) / len(tokens), rel=0.02)
    assert (cost.trained < cost.parameters) is lora


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("length", [64, 24, 96])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2", "gpt_neox"])
def test_activations_are_what_autograd_keeps(kind, length, lora):
    """Counted without memory, against the same pass with it; also where the length is one of the model's own sizes."""
    from peft import get_peft_model

    config = AutoConfig.for_model(kind, **SHAPE)

    def built(device: str) -> Any:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
            if lora:
                model = get_peft_model(model, lora_config({"r": 4, "lora_dropout": 0.1})).get_base_model()
        return model

    model = built("cpu").train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    taken = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    counted = _kept(built("meta"), length, half=False, recompute=False)
    assert counted is not None
    assert counted == pytest.approx(taken, rel=0.1)
    half = _kept(built("meta"), length, half=True, recompute=False)
    assert half is not None
    assert 0.4 * taken < half < 0.9 * taken, "norms may stay in fp32"
    again = _kept(built("meta"), length, half=False, recompute=True)
    assert again is not None
    assert again < counted


def test_a_dry_run_measures_steps_and_memory(config, tmp_path):
    prepared = prepare_data(config)
    job = DryRunJob(
        base=str(config.base),
        source=prepared["helpful"].train,
        pairs=16,
        dpo={**config.dpo, "gradient_accumulation_steps": 1},
        method=config.run_method,
    )
    measure_steps(job, tmp_path / "first")
    seen = measure_steps(job, tmp_path / "second")
    assert seen.seconds_a_step > 0
    assert seen.reference_seconds > 1e-3, "computed again, not read from what the first one left"
    assert not list(Path(job.source).glob("cache-*"))
    assert seen.memory > 1e7


def test_the_lines_name_every_figure():
    cost = Cost(
        parameters=1_000_000,
        trained=10_000,
        weights=4e6,
        gradients=4e4,
        optimizer=8e4,
        activations=None,
        batch=4,
        workers=1,
        longest=200,
        tokens_a_pair=300.0,
        runs=4,
        steps=100,
        pairs=400,
        scored=500,
    )
    state, tokens = cost.lines()
    assert "10,000 of 1,000,000 parameters" in state
    assert "activations not counted for this model (4 pairs of up to 200 tokens)" in state
    assert tokens.startswith("4 runs, 100 steps, 300 tokens a pair: 120,000 tokens, and 150,000 for the reference")
    first, then = cost.measured(
        DryRunResult(seconds_a_step=3.0, reference_seconds=1.0, memory=2_000_000_000), at_once=2
    )
    assert first == "measured: 3.00 s for a batch of 4 pairs, 2.0 GB at most"
    assert then.startswith("so about 2 min for the runs, 2 at once, and 2 min for the reference log-probs"), then
    two = dataclasses.replace(cost, workers=2)
    first, then = two.measured(DryRunResult(seconds_a_step=3.0, reference_seconds=1.0, memory=2_000_000_000), at_once=2)
    assert first == "measured: 3.00 s for a batch of 8 pairs, 2.0 GB at most on a device"
    assert then.startswith("so about 75 s for the runs, 2 at once, and 62 s for the reference log-probs"), then


@pytest.mark.parametrize(
    ("preset", "stated"),
    [
        ("zero1", (2e9, 2e9, 3e9)),
        ("zero2", (2e9, 5e8, 3e9)),
        ("zero3", (5e8, 5e8, 3e9)),
        ("zero2-offload", (2e9, 5e8, 0)),
        ("zero3-offload", (0, 5e8, 0)),
        ("fsdp2", (1e9, 1e9, 2e9)),
        ("fsdp2-offload", (0, 0, 0)),
        (None, (4e9, 4e9, 8e9)),
    ],
)
def test_the_bytes_of_a_billion_parameters_are_those_of_the_table(preset, stated):
    """docs/clusters.md, four workers, in 16 bits."""
    fsdp = preset if preset in FSDP else None
    method = Method(deepspeed=deepspeed_config(None if fsdp else preset), fsdp=fsdp_config(fsdp))
    state = _state(10**9, 10**9, method, 4, half=True, frozen_half=False)
    assert (state["weights"], state["gradients"], state["optimizer"]) == stated


@pytest.mark.slow
def test_a_dry_run_prints_the_cost_and_trains_nothing(config, ray_cluster):
    out = io.StringIO()
    run_train(config, Console(file=out, width=200), dry_run=True)
    assert "; together " in out.getvalue()
    assert re.search(r"^measured: \d+\.\d\d s for a batch of 16 pairs", out.getvalue(), re.MULTILINE), out.getvalue()
    assert not (config.folder / "dpo").exists()
    assert not (config.folder / "registry").exists()

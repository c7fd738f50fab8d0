"""Two workers under DDP and ZeRO give the vector that one process gives, with all parameters and with LoRA.

All of it runs in one Ray Train run, since starting one costs more than the training in it.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset, load_from_disk

from prefvec_ray.artifacts.training import Method, Watch
from prefvec_ray.preferences import load_preferences
from prefvec_ray.training import Resources
from prefvec_ray.training.dpo import REFERENCE, reference_logps, run_dpo
from prefvec_ray.training.model import load_base
from prefvec_ray.training.plan import start_run
from prefvec_ray.training.zero import deepspeed_config
from prefvec_ray.vectors import PreferenceVector, checkpoint_state, load_vector

RECIPE = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "bf16": False,
}
Kind = Literal["full", "lora"]
KINDS: tuple[Kind, ...] = ("full", "lora")
LORA = {"r": 4, "lora_alpha": 8}
# name -> (DeepSpeed preset, kind, changes of the recipe)
TWO_WORKERS: dict[str, tuple[str | None, Kind, dict[str, Any]]] = {
    "ddp": (None, "full", {}),
    "zero1": ("zero1", "full", {}),
    "zero2": ("zero2", "full", {}),
    "zero3": ("zero3", "full", {}),
    "zero2-offload": ("zero2-offload", "full", {}),
    "zero3-offload": ("zero3-offload", "full", {}),
    "zero3-bf16": ("zero3", "full", {"bf16": True}),
    "lora-ddp": (None, "lora", {}),
    "lora-zero3": ("zero3", "lora", {}),
}


def how(folder: Path, name: str, preset: str | None, kind: Kind, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": name,
        "train": [str(folder / "scored")],
        "test": {"helpful": str(folder / "held-out")},
        "dpo": {**RECIPE, "max_steps": 2, **recipe},
        "method": Method(kind=kind, lora=LORA if kind == "lora" else {}, deepspeed=deepspeed_config(preset)),
        "out": str(folder / name),
        "watch": Watch(evaluations=0),
    }


@pytest.fixture(scope="module")
def folder(world_folder, tmp_path_factory) -> Path:
    """`pairs` and, scored in this process, `scored`."""
    folder = tmp_path_factory.mktemp("methods")
    pairs = load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(32))
    pairs.save_to_disk(folder / "pairs")
    scored = reference_logps(str(world_folder / "base"), pairs, RECIPE, folder / "work")
    scored.save_to_disk(folder / "scored")
    scored.select(range(16)).save_to_disk(folder / "held-out")
    return folder


@pytest.fixture(scope="module")
def alone(spec_of, folder) -> dict[str, PreferenceVector]:
    """Full and LoRA, in this process: twice the accumulation in place of two workers."""
    for kind in KINDS:
        spec = spec_of(**how(folder, kind, None, kind, {"gradient_accumulation_steps": 2}))
        run_dpo(spec, lambda values: None, folder / "work")
    return {kind: load_vector(folder / kind / "delta") for kind in KINDS}


@pytest.fixture(scope="module")
def together(ray_cluster, spec_of, folder) -> dict[str, PreferenceVector]:
    """Every entry of TWO_WORKERS, and the folders `scored-zero3` and `scored-zero3-bf16` of reference log-probs."""
    specs = [spec_of(**how(folder, name, *method)).model_dump() for name, method in TWO_WORKERS.items()]
    specs[list(TWO_WORKERS).index("zero3-bf16")]["train"] = [str(folder / "scored-zero3-bf16")]

    def worker(config: dict[str, Any]) -> None:

        from prefvec_ray.artifacts.training import RunSpec
        from prefvec_ray.training.dpo import reference_logps, run_dpo
        from prefvec_ray.training.workers import worker_setup

        worker_setup()
        specs = {spec["key"]: RunSpec.model_validate(spec) for spec in config["specs"]}
        with tempfile.TemporaryDirectory() as work_dir:
            pairs = load_from_disk(config["pairs"])
            for name in ("zero3", "zero3-bf16"):
                spec = specs[name]
                scored = reference_logps(spec.base, pairs, spec.dpo, work_dir, spec.method)
                if torch.distributed.get_rank() == 0:
                    scored.save_to_disk(f"{config['folder']}/scored-{name}")
            torch.distributed.barrier()
            for spec in specs.values():
                run_dpo(spec, lambda values: None, work_dir)

    config = {"specs": specs, "pairs": str(folder / "pairs"), "folder": str(folder)}
    start_run(worker, config, "two-workers", Resources(workers=2), folder / "ray", retries=0).result()
    return {name: load_vector(folder / name / "delta") for name in TWO_WORKERS}


def error(vector: PreferenceVector, exact: PreferenceVector) -> float:
    """|vector - exact| / |exact| over all parameters."""
    assert vector.names() == exact.names()
    off = sum((vector.dense(name) - exact.dense(name)).square().sum().item() for name in exact.names())
    return (off / sum(exact.dense(name).square().sum().item() for name in exact.names())) ** 0.5


def test_two_workers_give_the_vector_of_one_process(together, alone):
    """Up to the order of sums, which also depends on the number of threads."""
    for name, (_, kind, recipe) in TWO_WORKERS.items():
        if recipe:
            continue
        off = error(together[name], alone[kind])
        assert off <= 1e-4, f"{name}: {off}"
        assert together[name].info.form == ("low-rank" if kind == "lora" else "full")


def test_zero3_in_bf16_gives_the_fp32_master_weights_change(together, alone, world_folder):
    """Not the change of the bf16 parameters, and without the rounding of an fp32 base as it was cast to bf16."""
    vector, exact = together["zero3-bf16"], alone["full"]
    assert vector.info.recipe["zero_stage"] == 3
    assert vector.info.recipe["compute"] == "bfloat16"
    assert error(vector, exact) < 0.15  # of the compute, not of the extraction
    name = "model.layers.0.mlp.gate_proj.weight"
    base = checkpoint_state(load_base(world_folder / "base"))[name]
    trained = base.bfloat16().float() + vector.dense(name)
    assert not torch.equal(trained, trained.bfloat16().float())
    as_cast = trained - base  # what a delta against the fp32 base itself would be
    assert (as_cast - exact.dense(name)).norm() > (vector.dense(name) - exact.dense(name)).norm()


def test_reference_log_probs_from_sharded_workers_are_those_of_one_process(together, folder):
    one, two = (Dataset.load_from_disk(folder / name) for name in ("scored", "scored-zero3"))
    assert two.column_names == one.column_names
    for column in REFERENCE:
        torch.testing.assert_close(torch.tensor(two[:][column]), torch.tensor(one[:][column]))


def test_a_bf16_run_starts_at_its_reference(together, folder):
    """The same numbers in both: before the first update margins are 0 and the loss of a pair is log 2."""
    first = json.loads((folder / "zero3-bf16" / "run.json").read_text())["history"][0]
    assert first["step"] == 1
    assert first["margin"] == pytest.approx(0, abs=1e-4)  # 1e-2 when reference log-probs are rounded to bf16
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_step_of_two_workers_takes_the_pairs_of_one_process(together, alone):
    assert together["ddp"].info.recipe["pairs_per_step"] == alone["full"].info.recipe["pairs_per_step"] == 16


def test_a_lora_run_under_zero3_leaves_an_adapter_for_peft(together, folder):
    assert {path.name for path in (folder / "lora-zero3" / "adapter").glob("*.safetensors")} == {
        "adapter_model.safetensors"
    }

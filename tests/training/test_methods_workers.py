"""Two workers under DDP, ZeRO and FSDP2 give the vector that one process gives, with all parameters and with LoRA.

All of it runs in one Ray Train run, since starting one costs more than the training in it.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset, load_from_disk

from prefvec_ray.artifacts.training import Method, RunSpec, Watch
from prefvec_ray.preferences import load_preferences
from prefvec_ray.training import Resources
from prefvec_ray.training.dpo import REFERENCE, reference_logps, run_dpo
from prefvec_ray.training.fsdp import PRESETS, fsdp_config
from prefvec_ray.training.model import load_base
from prefvec_ray.training.worker_groups import start_run
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
LORA = {"r": 4, "lora_alpha": 8}
GROUPED = {"train_sampling_strategy": "group_by_length", "padding_free": True}
# name -> (preset of DeepSpeed or FSDP, kind, changes of the recipe)
TWO_WORKERS: dict[str, tuple[str | None, Kind, dict[str, Any]]] = {
    "ddp": (None, "full", {}),
    "zero1": ("zero1", "full", {}),
    "zero2": ("zero2", "full", {}),
    "zero3": ("zero3", "full", {}),
    "zero2-offload": ("zero2-offload", "full", {}),
    "zero3-offload": ("zero3-offload", "full", {}),
    "fsdp2": ("fsdp2", "full", {}),
    "fsdp2-resumed": ("fsdp2", "full", {}),
    "fsdp2-moved": ("fsdp2", "full", {}),  # to four workers after its first step
    "fsdp2-offload": ("fsdp2-offload", "full", {"activation_checkpointing": True}),
    "zero3-bf16": ("zero3", "full", {"bf16": True}),
    "fsdp2-bf16": ("fsdp2", "full", {"bf16": True}),
    "padding-free": (None, "full", {"padding_free": True}),
    "grouped": (None, "full", GROUPED),
    "lora-ddp": (None, "lora", {}),
    "lora-zero3": ("zero3", "lora", {}),
    "lora-fsdp2": ("fsdp2", "lora", {}),
}


SCORED = ("zero3", "zero3-bf16", "fsdp2", "fsdp2-bf16")
"""Those whose workers score the pairs too; the bf16 ones train on what they scored."""


def method(preset: str | None, kind: Kind) -> Method:
    fsdp = preset if preset in PRESETS else None
    deepspeed = deepspeed_config(None if fsdp else preset)
    return Method(kind=kind, lora=LORA if kind == "lora" else {}, deepspeed=deepspeed, fsdp=fsdp_config(fsdp))


def how(folder: Path, name: str, preset: str | None, kind: Kind, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": name,
        "train": [str(folder / "scored")],
        "test": {"helpful": str(folder / "held-out")},
        "dpo": {**RECIPE, "max_steps": 2, **recipe},
        "method": method(preset, kind),
        "out": str(folder / name),
        "watch": Watch(evaluations=0),
    }


@pytest.fixture(scope="module")
def folder(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs` and, scored in this process, `scored`."""
    folder = tmp_path_factory.mktemp("methods")
    pairs = load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(32))
    pairs.save_to_disk(folder / "pairs")
    scored = reference_logps(str(world_folder / "base"), pairs, RECIPE, folder / "work")
    scored.save_to_disk(folder / "scored")
    scored.select(range(16)).save_to_disk(folder / "held-out")
    return folder


@pytest.fixture(scope="module")
def alone(spec_of: Callable[..., RunSpec], folder: Path) -> dict[str, PreferenceVector]:
    """Full and LoRA, in this process: twice the accumulation in place of two workers."""
    ways: dict[str, tuple[Kind, dict[str, Any]]] = {"full": ("full", {}), "lora": ("lora", {})}
    ways["grouped"] = ("full", {"train_sampling_strategy": "group_by_length"})
    for name, (kind, recipe) in ways.items():
        spec = spec_of(**how(folder, f"alone-{name}", None, kind, {"gradient_accumulation_steps": 2, **recipe}))
        run_dpo(spec, lambda values: None, folder / "work")
    return {name: load_vector(folder / f"alone-{name}" / "delta") for name in ways}


@pytest.fixture(scope="module")
def together(ray_cluster: str, spec_of: Callable[..., RunSpec], folder: Path) -> dict[str, PreferenceVector]:
    """Every entry of TWO_WORKERS, and a folder `scored-<name>` of reference log-probs for each of SCORED."""
    specs = {name: spec_of(**how(folder, name, *way)).model_dump() for name, way in TWO_WORKERS.items()}
    for name in ("zero3-bf16", "fsdp2-bf16"):
        specs[name]["train"] = [str(folder / f"scored-{name}")]
    for name in ("fsdp2-resumed", "fsdp2-moved"):
        specs[name]["checkpoint_every"] = 1

    def worker(config: dict[str, Any]) -> None:
        from prefvec_ray.artifacts.training import RunSpec
        from prefvec_ray.training.dpo import TokenizedDPOTrainer, reference_logps, run_dpo
        from prefvec_ray.training.workers import worker_setup

        class BrokenError(Exception):
            pass

        class Breaking(TokenizedDPOTrainer):
            def training_step(self, *args, **kwargs):  # no types: it is sent to the workers without them
                assert self.ref_model is None
                if self.state.global_step == 1:
                    raise BrokenError
                return super().training_step(*args, **kwargs)

        worker_setup()
        specs = {name: RunSpec.model_validate(spec) for name, spec in config["specs"].items()}
        with tempfile.TemporaryDirectory() as work_dir:
            pairs = load_from_disk(config["pairs"])
            for name in config["scored"]:
                spec = specs[name]
                scored = reference_logps(spec.base, pairs, spec.dpo, work_dir, spec.method)
                if torch.distributed.get_rank() == 0:
                    scored.save_to_disk(f"{config['folder']}/scored-{name}")
            torch.distributed.barrier()
            for name, spec in specs.items():
                if name in config["broken"]:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr("prefvec_ray.training.dpo.TokenizedDPOTrainer", Breaking)
                        with pytest.raises(BrokenError):
                            run_dpo(spec, lambda values: None, work_dir)
                if name != config["left"]:
                    run_dpo(spec, lambda values: None, work_dir)

    config = {"specs": specs, "scored": SCORED, "pairs": str(folder / "pairs"), "folder": str(folder)}
    config |= {"broken": ("fsdp2-resumed", "fsdp2-moved"), "left": "fsdp2-moved"}
    start_run(worker, config, "two-workers", Resources(workers=2), folder / "ray", retries=0).result()
    moved = specs["fsdp2-moved"]
    moved["dpo"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    config |= {"specs": {"fsdp2-moved": moved}, "scored": (), "broken": (), "left": ""}
    start_run(worker, config, "four-workers", Resources(workers=4), folder / "ray", retries=0).result()
    return {name: load_vector(folder / name / "delta") for name in TWO_WORKERS}


def error(vector: PreferenceVector, exact: PreferenceVector) -> float:
    """|vector - exact| / |exact| over all parameters."""
    assert vector.names() == exact.names()
    off = sum((vector.dense(name) - exact.dense(name)).square().sum().item() for name in exact.names())
    return (off / sum(exact.dense(name).square().sum().item() for name in exact.names())) ** 0.5


def test_two_workers_give_the_vector_of_one_process(together, alone):
    """Up to the order of sums, which also depends on the number of threads."""
    for name, (preset, kind, recipe) in TWO_WORKERS.items():
        if recipe.get("bf16"):
            continue
        off = error(together[name], alone["grouped" if name == "grouped" else kind])
        assert off <= 1e-4, f"{name}: {off}"
        if preset in PRESETS:
            off = error(together[name], together["ddp" if kind == "full" else "lora-ddp"])
            assert off <= 1e-5, f"{name} against DDP: {off}"
        assert together[name].info.form == ("low-rank" if kind == "lora" else "full")


def test_a_resumed_fsdp2_run_equals_an_uninterrupted_one(together, folder):
    """With as many workers bit by bit, with other ones up to the order of sums."""
    for name in ("fsdp2-resumed", "fsdp2-moved"):
        assert json.loads((folder / name / "run.json").read_text())["resumed_at"] == 1
    assert error(together["fsdp2-moved"], together["fsdp2"]) <= 1e-5
    assert error(together["fsdp2-resumed"], together["fsdp2"]) == 0.0


def test_fsdp2_in_bf16_keeps_fp32_master_weights_of_the_base_itself(together, alone, world_folder):
    """Also of the head, which the last forward pass leaves gathered and rounded."""
    vector, exact = together["fsdp2-bf16"], alone["full"]
    assert (vector.info.recipe["fsdp"], vector.info.recipe["compute"]) == (2, "bfloat16")
    assert error(vector, exact) < 0.15  # of the compute
    base = checkpoint_state(load_base(world_folder / "base"))
    for name in vector.names():
        trained = base[name] + vector.dense(name)
        assert (trained == trained.bfloat16().float()).float().mean() < 0.5, name


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


@pytest.mark.parametrize("sharded", ["zero3", "fsdp2"])
def test_reference_log_probs_from_sharded_workers_are_those_of_one_process(together, folder, sharded):
    one, two = (Dataset.load_from_disk(folder / name) for name in ("scored", f"scored-{sharded}"))
    assert two.column_names == one.column_names
    for column in REFERENCE:
        torch.testing.assert_close(torch.tensor(two[:][column]), torch.tensor(one[:][column]))


@pytest.mark.parametrize("run", ["zero3-bf16", "fsdp2-bf16"])
def test_a_bf16_run_starts_at_its_reference(together, folder, run):
    """The same numbers in both: before the first update margins are 0 and the loss of a pair is log 2."""
    first = json.loads((folder / run / "run.json").read_text())["history"][0]
    assert first["step"] == 1
    assert first["margin"] == pytest.approx(0, abs=1e-4)  # 1e-2 when reference log-probs are rounded to bf16
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_batches_of_like_length_are_other_batches(alone):
    assert error(alone["grouped"], alone["full"]) > 1e-2


def test_a_step_of_two_workers_takes_the_pairs_of_one_process(together, alone):
    assert together["ddp"].info.recipe["pairs_per_step"] == alone["full"].info.recipe["pairs_per_step"] == 16


@pytest.mark.parametrize("run", ["lora-zero3", "lora-fsdp2"])
def test_a_sharded_lora_run_leaves_an_adapter_for_peft(together, folder, run):
    assert {path.name for path in (folder / run / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}

"""The supervised stage before DPO: what it makes, when it runs, and what it refuses."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.tiny_world import TinyWorld
from prefvec_ray.training import Resources, TrainingConfig
from prefvec_ray.training.config import SftStage
from prefvec_ray.training.model import load_base
from prefvec_ray.training.sft import SftJob, fine_tuned, run_sft, write_examples
from prefvec_ray.training.worker_groups import worker_groups
from prefvec_ray.vectors import fingerprint

RECIPE = {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 of the micro world's demonstrations, as prompt and completion."""
    file = tmp_path_factory.mktemp("sft") / "sft.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in TinyWorld("micro").sft_examples()[:64]))
    return file


def job_of(world_folder: Path, examples: Path, out: Path, kind: Literal["full", "lora"] = "full") -> SftJob:
    base = world_folder / "base"
    data, digest, _ = write_examples(SftStage(data=str(examples)), base, out.parent / "data")
    return SftJob(
        base=str(base),
        base_fingerprint=fingerprint(base),
        data=str(data),
        data_digest=digest,
        recipe=RECIPE,
        method=Method(kind=kind, lora={"r": 8, "lora_alpha": 32} if kind == "lora" else {}),
        checkpoint_every=None,
        out=str(out),
    )


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in load_base(folder).parameters()])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_stage_learns_and_leaves_a_whole_model(world_folder, examples, tmp_path, kind):
    said: list[dict[str, Any]] = []
    job = job_of(world_folder, examples, tmp_path / "out", kind)
    run_sft(job, said.append, tmp_path / "work")
    assert [values["step"] for values in said] == [1, 2, 3, 4]
    assert said[-1]["loss"] < said[0]["loss"]
    told = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert told["steps"] == 4
    assert told["recipe"] == RECIPE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == AutoModelForCausalLM.from_pretrained(world_folder / "base").dtype
    assert not torch.equal(weights(tmp_path / "out"), weights(world_folder / "base"))
    assert fingerprint(tmp_path / "out") != fingerprint(world_folder / "base")


def test_two_workers_fine_tune_as_one_process_once_and_are_then_skipped(
    ray_cluster, config, world_folder, examples, tmp_path
):
    stage = SftStage.model_validate({"data": str(examples), **RECIPE, "per_device_train_batch_size": 4})
    both = config.model_copy(update={"sft": stage, "resources": Resources(workers=2), "checkpoint_every": 2})
    with worker_groups(config.folder, config.folder / "ray") as groups:
        done = fine_tuned(both, groups)
        written = (done.base / "sft.json").stat().st_mtime_ns
        assert fine_tuned(both, groups) == done
        assert (done.base / "sft.json").stat().st_mtime_ns == written
    assert done.sft is None
    assert done.base.parent == config.folder / "sft"
    assert [path.name for path in done.base.parent.iterdir()] == [done.base.name]  # no checkpoint, nothing partial
    done.check()

    run_sft(job_of(world_folder, examples, tmp_path / "alone"), lambda values: None, tmp_path / "work")
    change = weights(done.base) - weights(world_folder / "base")
    alone = weights(tmp_path / "alone") - weights(world_folder / "base")
    # A step's loss is averaged over each worker's own tokens, so two halves weigh a little differently than one whole.
    assert torch.cosine_similarity(change, alone, dim=0) > 0.98


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "row 1: expected messages, or .*, or prompt and completion, or text, got ch",
        ),
        ({"messages": []}, "row 1: field 'messages' must be a list of messages .* that ends with the assistant"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "row 1: field 'messages' must be .* ends with the assistant",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "row 1, messages: field 'content' is missing"),
        ({"prompt": "a", "completion": ""}, "no example to learn from .1 rows dropped: an answer is empty"),
        ({"text": 7}, "row 1: field 'text' is 7"),
        ({"instruction": "a", "output": "b", "tools": ["c"]}, "row 1: conversations with tools are not supported"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "row 1: conversations must end with a turn from gpt"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(world_folder, tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        write_examples(SftStage(data=str(file)), world_folder / "base", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_later_row_of_another_kind_is_named(world_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": [{"role": "x", "content": "y"}]}'
    )
    with pytest.raises(InputError, match="row 2: field 'completion' is"):
        write_examples(SftStage(data=str(file)), world_folder / "base", tmp_path / "data")


def test_every_field_of_sft_config_is_reachable_and_no_other(config, examples):
    fields = config.model_dump(mode="json")

    def parsed(**sft: Any) -> TrainingConfig:
        return parse_config({**fields, "sft": {"data": str(examples), **sft}}, TrainingConfig, source="job.yaml")

    good = parsed(learning_rate=2e-5, packing=True, max_length=256, rows=8)
    good.check()
    assert good.sft is not None
    assert good.sft.recipe == {"learning_rate": 2e-5, "packing": True, "max_length": 256}
    assert good.sft.rows == 8
    with pytest.raises(InputError, match=r"sft\.learning_rat .*did you mean 'learning_rate'"):
        parsed(learning_rat=1).check()
    with pytest.raises(InputError, match=r"sft\.output_dir is set by the plan"):
        parsed(output_dir="x")

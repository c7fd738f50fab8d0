"""Methods of training in one process: losses, LoRA, precision. Several workers: test_methods_workers.py."""

import gc
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from trl import DPOConfig

from prefvec_ray.artifacts.training import Method, RunResult, Watch
from prefvec_ray.common.errors import InputError
from prefvec_ray.training.delta import bf16_checkpoints_keep
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.lora import check_lora, lora_config
from prefvec_ray.training.model import load_base
from prefvec_ray.training.recipe import LOSS_TYPES
from prefvec_ray.training.train import extract_vectors
from prefvec_ray.training.watch import RunStoppedError
from prefvec_ray.vectors import (
    LowRank,
    PreferenceVector,
    checkpoint_state,
    load_vector,
    merge,
    subtract,
    vector_from_checkpoints,
)

FULL = Method()
UNWATCHED = {"watch": Watch(evaluations=0, wrong_way=None), "answers": []}


@pytest.fixture
def run(scored, tmp_path):
    """run(name, recipe..., method=...) trains on the first pairs and returns the delta and run.json."""
    few = tmp_path / "pairs"
    scored["pairs"].select(range(32)).save_to_disk(few)

    def train(
        name: str, *, method: Method = FULL, polarity: str = "positive", **recipe: Any
    ) -> tuple[PreferenceVector, RunResult | None]:
        spec = scored["spec"].model_copy(
            update={
                **UNWATCHED,
                "train": [str(few)],
                "test": {"helpful": str(few)},
                "dpo": {**scored["spec"].dpo, "per_device_train_batch_size": 16, "max_steps": 2, **recipe},
                "method": method,
                "polarity": polarity,
                "out": str(tmp_path / name),
            }
        )
        result = run_dpo(spec, lambda values: None, tmp_path / "work")
        return load_vector(tmp_path / name / "delta"), result

    return train


def dense(vector: PreferenceVector) -> torch.Tensor:
    return torch.cat([vector.dense(name).flatten() for name in vector.names()])


def cosine(one: PreferenceVector, other: PreferenceVector) -> float:
    return torch.cosine_similarity(dense(one), dense(other), dim=0).item()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_does_not_depend_on_what_its_process_did_before(run, kind):
    method = Method(kind=kind)
    torch.manual_seed(1)
    first, told = run("first", method=method)
    memory = [torch.ones(1 << 26)]  # 256 MB
    torch.rand(7)
    memory.clear()
    second, told_again = run("second", method=method)
    assert torch.equal(dense(first), dense(second))
    assert told is not None
    assert told_again is not None
    assert abs(told_again.memory - told.memory) < 100e6, "the peak is this run's own"


def test_lora_runs_of_a_node_share_the_pages_of_their_base(scored, tmp_path):
    """A frozen base that is computed in the dtype of its files is those files, mapped: no run has a copy of its own."""
    weights = Path(scored["spec"].base) / "model.safetensors"
    with safe_open(weights, "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) * 4 for name in file.keys()]  # noqa: SIM118
    seen: list[tuple[int, int]] = []

    def look(values: dict[str, Any]) -> None:
        """Bytes of the frozen parameters that lie in the mapped file, and bytes of the file that are copied."""
        copied, inside = 0, False
        ranges: list[range] = []
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = line.endswith(str(weights))
                if inside:
                    ranges.append(range(int(found[1], 16), int(found[2], 16)))
            elif inside and line.startswith("Anonymous:"):
                copied += int(line.split()[1]) * 1024
        frozen = {each.data_ptr(): each for each in gc.get_objects() if type(each) is torch.nn.Parameter}
        mapped = [each.nbytes for start, each in frozen.items() if any(start in each for each in ranges)]
        seen.append((sum(mapped), copied))

    changes = {**UNWATCHED, "method": Method(kind="lora"), "out": str(tmp_path / "run")}
    run_dpo(scored["spec"].model_copy(update=changes), look, tmp_path / "work")
    assert seen
    assert set(seen) == {(sum(sizes), 0)}


def test_the_losses_are_all_that_trl_has():
    text = next(
        field.metadata["help"] for field in DPOConfig.__dataclass_fields__.values() if field.name == "loss_type"
    )
    assert set(re.findall(r"'(\w+)'", text)) == set(LOSS_TYPES)


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_every_loss_trains_and_is_named_in_the_vector(run, loss):
    smoothing = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
    vector, _ = run("run", loss_type=loss, max_steps=1, **smoothing)
    assert vector.info.recipe["loss_type"] == [loss]
    assert vector.info.recipe["parameters"] == "full"
    assert dense(vector).abs().max() > 0


def test_losses_are_combined_with_their_weights(run):
    vector, _ = run("run", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], max_steps=1)
    assert vector.info.recipe["loss_type"] == ["sigmoid", "sft"]
    assert vector.info.recipe["loss_weights"] == [1.0, 0.2]


def test_a_vector_of_the_positive_run_alone(run, config):
    delta, result = run("run", max_steps=1)
    half = config.model_copy(update={"polarity": "positive"})
    (folder,) = extract_vectors(half, [result.spec]).values()
    vector = load_vector(folder)
    assert (vector.info.preference, vector.info.dtype) == ("helpful", "bfloat16")
    assert vector.info.parents == {"positive": delta.digest()}
    assert vector.info.recipe == {"polarity": "positive", "positive": delta.info.recipe}
    assert "in_bf16_checkpoints" in vector.info.precision
    for name in delta.names():
        assert torch.equal(vector.dense(name), delta.dense(name).bfloat16().float())


LORA = {"r": 4, "lora_alpha": 8}


def test_a_lora_run_is_kept_exactly_as_low_rank_factors(run, scored):
    base = scored["spec"].base
    method = Method(kind="lora", lora={**LORA, "modules_to_save": ["norm"]})
    positive, result = run("positive", method=method)
    negative, _ = run("negative", method=method, polarity="negative")
    assert positive.info.form == "low-rank"
    assert positive.info.recipe["lora"]["r"] == 4

    merged = PeftModel.from_pretrained(load_base(base), Path(positive.path).parent / "adapter").merge_and_unload()
    exact = vector_from_checkpoints(merged, load_base(base), base=base, preference="helpful+", dtype=torch.float32)
    assert positive.names() == exact.names()
    torch.testing.assert_close(dense(positive), dense(exact), rtol=1e-4, atol=1e-7)
    assert "model.norm.weight" in positive  # trained whole
    assert result.precision["masters"] == "float32"

    phi = subtract(positive, negative, preference="helpful", dtype=torch.float32)
    entry = phi.entry("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(entry, LowRank)
    assert entry.rank == 8
    torch.testing.assert_close(dense(phi), dense(positive) - dense(negative))


def test_lora_over_a_base_stored_in_bf16_changes_the_adapter_only(run, scored, tmp_path):
    base = tmp_path / "base"
    load_base(scored["spec"].base, dtype=torch.bfloat16).save_pretrained(base)
    for file in Path(scored["spec"].base).glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    scored = {**scored, "spec": scored["spec"].model_copy(update={"base": str(base)})}
    spec = scored["spec"].model_copy(
        update={
            **UNWATCHED,
            "dpo": {**scored["spec"].dpo, "bf16": True, "max_steps": 2},
            "method": Method(kind="lora", lora=LORA),
            "out": str(tmp_path / "run"),
        }
    )
    run_dpo(spec, lambda values: None, tmp_path / "work")
    vector = load_vector(tmp_path / "run" / "delta")
    factors = [part for name in vector.names() for part in vector.entry(name).parts().values()]
    assert any(not torch.equal(part, part.bfloat16().float()) for part in factors)  # fp32 masters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4}, "lora.rank is not a field"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["no_such_layer"]}, "PEFT refuses it"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is tied"),
        ({"target_modules": ["lm_head"]}, "lm_head|head's own weight"),
        ({"modules_to_save": ["lm_head"]}, "tied"),
    ],
)
def test_what_could_not_be_kept_exactly_is_refused_before_training(world_folder, fields, message):
    with pytest.raises(InputError, match=message):
        check_lora(world_folder / "base", fields, sharded=False)


def test_whole_parameters_beside_lora_are_refused_under_deepspeed(world_folder):
    check_lora(world_folder / "base", {"modules_to_save": ["norm"]}, sharded=False)
    with pytest.raises(InputError, match="modules_to_save"):
        check_lora(world_folder / "base", {"modules_to_save": ["norm"]}, sharded=True)


def test_bf16_compute_keeps_what_bf16_checkpoints_lose(run, scored, tmp_path):
    """At a learning rate like DPO's, where phi is about a thousandth of the weights."""
    base = scored["spec"].base
    recipe = {"learning_rate": 1e-5, "adam_epsilon": 1e-4}
    exact, _ = run("fp32", bf16=False, **recipe)
    vector, result = run("bf16", bf16=True, **recipe)
    assert vector.info.recipe["compute"] == "bfloat16"
    rounded = merge(checkpoint_state(load_base(base)), {"run": vector}, {"run": 1.0})
    with pytest.warns(match="bfloat16 checkpoints"):
        lossy = vector_from_checkpoints(
            {name: tensor.bfloat16() for name, tensor in rounded.items()},
            {name: tensor.bfloat16() for name, tensor in checkpoint_state(load_base(base)).items()},
            base=checkpoint_state(load_base(base)),
            preference="lossy",
            dtype=torch.float32,
        )
    said = result.precision["in_bf16_checkpoints"]
    full = torch.cat(
        [(lossy.dense(n) if n in lossy else torch.zeros(vector.shape(n))).flatten() for n in vector.names()]
    )
    really = torch.cosine_similarity(full, dense(vector), dim=0).item()
    assert said["cosine"] == pytest.approx(really, abs=1e-4)
    assert cosine(exact, vector) > 0.99 > 2 * said["cosine"]


def test_activation_checkpointing_changes_no_number(run):
    plain, _ = run("plain")
    saving, _ = run("saving", activation_checkpointing=True)
    assert torch.equal(dense(plain), dense(saving))


def test_a_run_that_breaks_in_its_last_step_is_stopped_too(run):
    with pytest.raises(RunStoppedError, match="not finite"):
        run("run", learning_rate=1e39, max_grad_norm=0.0, max_steps=1)


def test_bf16_checkpoints_of_two_runs_are_compared_over_the_numbers_that_changed(run, scored):
    positive, _ = run("positive")
    negative, _ = run("negative", polarity="negative")
    kept = bf16_checkpoints_keep(scored["spec"].base, positive, negative)
    lost = kept["relative_error"]
    assert isinstance(lost, float)
    assert 0 < lost < 1
    assert bf16_checkpoints_keep(scored["spec"].base, positive, positive) == {
        "cosine": 0.0,
        "relative_error": 0.0,
        "lost": 0.0,
    }


def test_lora_takes_every_field_of_peft():
    config = lora_config({"r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}})
    assert (config.r, config.use_rslora, config.target_modules) == (3, True, "all-linear")

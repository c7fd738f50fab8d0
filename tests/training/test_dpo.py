from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOTrainer

from prefvec_ray.artifacts.training import RunSpec
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import flip, load_preferences
from prefvec_ray.training.dpo import (
    REFERENCE,
    TOKENIZED,
    dpo_config,
    mix_equally,
    reference_logps,
    run_dpo,
)
from prefvec_ray.training.model import load_base, load_tokenizer
from prefvec_ray.vectors import fingerprint, load_vector

RECIPE = {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1, "logging_steps": 1}


@pytest.fixture
def trained_on(spec_of):
    """The spec of a run on some pairs, which lie beside it."""

    def made(folder: Path, train: Dataset, **changes: Any) -> RunSpec:
        train.save_to_disk(folder / "train")
        pairs = str(folder / "train")
        return spec_of(train=[pairs], test={"helpful": pairs}, dpo=RECIPE, out=str(folder / "run"), **changes)

    return made


def pairs_of(world_folder, rows=64):
    return load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(rows))


@pytest.mark.slow
def test_reused_reference_gives_the_losses_of_the_stock_trainer(world_folder, tmp_path, trained_on):
    pairs, base = pairs_of(world_folder), str(world_folder / "base")
    stock = DPOTrainer(
        model=load_base(base),
        ref_model=load_base(base),
        args=dpo_config(RECIPE, tmp_path / "stock", precompute_ref_log_probs=False),
        train_dataset=pairs,
        processing_class=load_tokenizer(base),
    )
    stock.train()
    expected = [log["loss"] for log in stock.state.log_history if "loss" in log]

    scored = reference_logps(base, pairs, RECIPE, tmp_path / "reference")
    result = run_dpo(trained_on(tmp_path, scored), lambda values: None, tmp_path / "work")

    assert result is not None
    assert len(expected) == 4
    torch.testing.assert_close(torch.tensor([point.loss for point in result.history]), torch.tensor(expected))


@pytest.mark.slow
def test_the_flipped_run_is_the_run_on_swapped_pairs_with_the_same_reference(world_folder, tmp_path, trained_on):
    pairs, base = pairs_of(world_folder), str(world_folder / "base")
    scored = reference_logps(base, pairs, RECIPE, tmp_path / "one")
    swapped = reference_logps(
        base,
        pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"}),
        RECIPE,
        tmp_path / "two",
    )
    assert flip(scored)[:][REFERENCE[0]] == swapped[:][REFERENCE[0]]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flipped = trained_on(tmp_path / "a", scored, polarity="negative")
    trained_on_swapped = trained_on(tmp_path / "b", swapped)
    run_dpo(flipped, lambda values: None, tmp_path / "work")
    run_dpo(trained_on_swapped, lambda values: None, tmp_path / "work")
    a, b = (load_vector(f"{spec.out}/delta") for spec in (flipped, trained_on_swapped))
    assert a.info.preference == "helpful-"
    assert all(torch.equal(a.dense(name), b.dense(name)) for name in a.names())


def test_a_run_writes_the_fp32_difference_to_its_base_and_reports_steps(world_folder, tmp_path, trained_on):
    base = str(world_folder / "base")
    scored = reference_logps(base, pairs_of(world_folder), RECIPE, tmp_path / "reference")
    said: list[dict[str, Any]] = []
    result = run_dpo(trained_on(tmp_path, scored), said.append, tmp_path / "work")
    delta = load_vector(tmp_path / "run" / "delta")
    untrained = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert set(delta.names()) == set(untrained)  # every parameter moved, tied embeddings once
    assert all(delta.dense(name).dtype == torch.float32 for name in delta.names())
    assert delta.info.base_fingerprint == fingerprint(base)
    assert [values["step"] for values in said if "loss" in values] == [1, 2, 3, 4]
    assert result is not None
    assert result.steps == 4
    assert result.pairs == 64


@pytest.mark.slow
def test_polarities_separate_on_pairs_of_the_data(world_folder, tmp_path, trained_on):
    base = str(world_folder / "base")
    scored = reference_logps(base, pairs_of(world_folder, 256), RECIPE, tmp_path / "reference")
    accuracy = {}
    for polarity in ("positive", "negative"):
        (tmp_path / polarity).mkdir()
        spec = trained_on(tmp_path / polarity, scored, polarity=polarity)
        result = run_dpo(spec, lambda values: None, tmp_path / "work")
        assert result is not None
        accuracy[polarity] = result.held_out["helpful"].accuracy
        assert result.history[-1].loss < result.history[0].loss
    assert accuracy["positive"] > 0.6
    assert accuracy["negative"] < 0.4


def test_mixing_takes_equal_shares_and_as_many_pairs_as_one_preference_has(world_folder, tmp_path):
    base = str(world_folder / "base")
    one = reference_logps(base, pairs_of(world_folder, 20), RECIPE, tmp_path / "reference")
    other = one.map(lambda row: {REFERENCE[0]: 1.0})
    mixed = mix_equally([one, other], seed=0)
    assert mixed.column_names == TOKENIZED + REFERENCE
    assert len(mixed) == 20
    assert sum(value == 1.0 for value in mixed[:][REFERENCE[0]]) == 10
    assert mix_equally([one], seed=0) is one


def test_reference_rows_do_not_depend_on_their_neighbours(world_folder, tmp_path):
    base = str(world_folder / "base")
    pairs = pairs_of(world_folder, 24)
    both = concatenate_datasets([pairs.select(range(12, 24)), pairs.select(range(12))])
    forward = reference_logps(base, pairs, RECIPE, tmp_path / "a")
    backward = reference_logps(base, both, RECIPE, tmp_path / "b")
    torch.testing.assert_close(
        torch.tensor(forward[:][REFERENCE[0]]), torch.tensor(backward[:][REFERENCE[0]]).roll(-12), rtol=1e-5, atol=1e-4
    )
    forward.save_to_disk(tmp_path / "kept")
    assert load_from_disk(tmp_path / "kept").column_names == TOKENIZED + REFERENCE


def test_reference_log_probs_of_another_precision_are_not_taken_from_the_cache_beside_the_data(world_folder, tmp_path):
    base = str(world_folder / "base")
    pairs_of(world_folder, 8).save_to_disk(tmp_path / "pairs")
    saved = load_from_disk(tmp_path / "pairs")
    exact = reference_logps(base, saved, {**RECIPE, "bf16": False}, tmp_path / "a")
    half = reference_logps(base, saved, {**RECIPE, "bf16": True}, tmp_path / "b")
    assert exact[:][REFERENCE[0]] != half[:][REFERENCE[0]]
    torch.testing.assert_close(
        torch.tensor(exact[:][REFERENCE[0]]), torch.tensor(half[:][REFERENCE[0]]), rtol=1e-2, atol=0
    )


def test_the_reference_pass_takes_no_pair_beyond_the_context(world_folder, tmp_path):
    base = str(world_folder / "base")
    context = AutoConfig.from_pretrained(base).max_position_embeddings
    pairs = Dataset.from_list([{"prompt": "a b", "chosen": " a" * context, "rejected": " b"}])
    with pytest.raises(InputError, match=rf"up to \d+ tokens; the base has a context of {context}: set dpo"):
        reference_logps(base, pairs, {"max_length": None}, tmp_path)
    reference_logps(base, pairs, {"max_length": context}, tmp_path)

"""An untrained micro base and a few pairs of its world: enough to see every mechanism of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from prefvec_ray.artifacts.training import RunSpec, Watch
from prefvec_ray.preferences import load_preferences
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.training import PreferenceData, TrainingConfig
from prefvec_ray.training.dpo import reference_logps
from prefvec_ray.vectors import fingerprint


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/` and the micro world's files."""
    folder = tmp_path_factory.mktemp("micro-world")
    world = TinyWorld("micro")
    world.write(folder)
    tokenizer = build_tokenizer(world)
    new_model(world, tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture
def config(world_folder: Path, tmp_path: Path) -> TrainingConfig:
    """Two preferences over 64 pairs, four steps a run."""
    pairs = PreferenceData(
        data=str(world_folder / "preferences.jsonl"), test=str(world_folder / "preferences_test.jsonl"), rows=64
    )
    return TrainingConfig(
        name="job",
        output=tmp_path,
        base=world_folder / "base",
        preferences={"helpful": pairs, "harmless": pairs},
        dpo={"learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1},
    )


@pytest.fixture(scope="session")
def spec_of(world_folder: Path) -> Callable[..., RunSpec]:
    """`spec_of(train=..., out=..., ...)`: a positive run of `helpful` on the untrained base."""
    base = str(world_folder / "base")
    common = {
        "key": "run",
        "preference": "helpful",
        "polarity": "positive",
        "seed": 0,
        "base": base,
        "base_fingerprint": fingerprint(base),
        "data_digest": "none",
    }
    return lambda **given: RunSpec.model_validate(common | given)


SCORED_RECIPE = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 1,
    "logging_steps": 1,
}


@pytest.fixture(scope="session")
def scored(
    world_folder: Path, spec_of: Callable[..., RunSpec], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """128 scored pairs, two answers of the base to 8 of their prompts, and a spec that trains on them."""
    from prefvec_ray.training.answers import base_answers

    folder, base = tmp_path_factory.mktemp("scored"), str(world_folder / "base")
    pairs = load_preferences(world_folder / "preferences.jsonl", preference="helpful").dataset.select(range(128))
    scored = reference_logps(base, pairs, SCORED_RECIPE, folder / "work")
    scored.save_to_disk(folder / "pairs")
    base_answers(base, scored, samples=16, tokens=12, max_length=512).save_to_disk(folder / "drawn")
    answers = reference_logps(base, Dataset.load_from_disk(folder / "drawn"), SCORED_RECIPE, folder / "work")
    answers.save_to_disk(folder / "answers")
    spec = spec_of(
        train=[str(folder / "pairs")],
        test={"helpful": str(folder / "pairs")},
        answers=[str(folder / "answers")],
        dpo=SCORED_RECIPE,
        out="",
        watch=Watch(evaluations=4, held_out_pairs=32),
    )
    return {"pairs": scored, "answers": answers, "spec": spec}

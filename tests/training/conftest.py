"""An untrained micro base and a few pairs of its world: enough to see every mechanism of training."""

from pathlib import Path

import pytest

from prefvec_ray.preferences import TinyWorld, build_tokenizer, new_model
from prefvec_ray.training import PreferenceData, TrainingConfig


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

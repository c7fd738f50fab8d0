"""An untrained micro model whose answers end after a few tokens, and what pairs are made of with it."""

from pathlib import Path
from typing import Any

import pytest

from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-policy") / "base"
    world = TinyWorld("micro")
    tokenizer = build_tokenizer(world, vocab_size=400)
    model = new_model(world, tokenizer)
    model.generation_config.eos_token_id = list(range(300, 400))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(base: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a config: twelve prompts, one of them twice and one excluded, ranked by brevity."""
    washed = ["cats", "dogs", "owls", "frogs", "newts", "boats", "cups", "pans", "pots", "hats", "gloves"]
    prompts = [f"How do I wash {what}?" for what in washed]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "how do I wash cats"]))
    (tmp_path / "report.txt").write_text("How do I wash gloves?!\nHow do I fly?")
    return {
        "preference": "brief",
        "base": base,
        "prompts": str(tmp_path / "prompts.txt"),
        "exclude": [str(tmp_path / "report.txt")],
        "scorers": [{"type": "length", "direction": "minimize"}],
        "samples_per_prompt": 6,
        "max_new_tokens": 12,
        "output": tmp_path / "made",
    }

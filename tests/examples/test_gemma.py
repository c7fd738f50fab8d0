"""The case study's configs are read by their models, and its data keeps what is measured apart from what is learned."""

import csv
import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from prefvec_ray.common.config import load_config
from prefvec_ray.robustness import Ladder
from prefvec_ray.robustness.scorer import ScorerRecipe
from prefvec_ray.scorers import load_prompts
from prefvec_ray.scorers.train import ScorerTrainingConfig
from prefvec_ray.search import EvalConfig, SearchJob
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.training import TrainingConfig

GEMMA = Path(__file__).parents[2] / "examples" / "gemma"
KINDS: dict[str, type[BaseModel]] = {
    "train": TrainingConfig,
    "again": TrainingConfig,
    "reward": ScorerTrainingConfig,
    "harm": ScorerRecipe,
    "ladder": Ladder,
    "measure": EvalConfig,
    "seeds": EvalConfig,
    "search": SearchJob,
}


@pytest.mark.parametrize("path", sorted(GEMMA.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_read_by_its_model(path, tmp_path, monkeypatch):
    for name in re.findall(r"\$\{(\w+)\}", path.read_text()):
        monkeypatch.setenv(name, str(tmp_path))
    if path.stem == "serve":
        (application,) = yaml.safe_load(path.read_text())["applications"]
        ServingConfig.model_validate(application["args"])
    else:
        load_config(path, KINDS[path.stem])


def test_every_file_of_the_folder_is_named_by_its_readme():
    told = (GEMMA / "README.md").read_text()
    assert all(path.name in told for path in GEMMA.iterdir() if path.is_file() and path.name != "README.md")


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if n % 2 == 0 else 'Assistant'}: {turn}" for n, turn in enumerate(turns))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the forms of the public ones, with invented words."""
    folder, draw = tmp_path_factory.mktemp("public"), random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count))

    for part in ("preference/hh-helpful-base", "preference/hh-harmless-base", "sft", "eval"):
        (folder / part).mkdir(parents=True)
    for name in ("helpful", "harmless"):
        rows = []
        for _ in range(300):
            turns = [words(draw.choice((6, 40, 90))) for _ in range(draw.choice((1, 3)))]
            rows.append({side: transcript(*turns, words(9)) for side in ("chosen", "rejected")})
        with gzip.open(folder / f"preference/hh-{name}-base/test.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with gzip.open(folder / "preference/pku_seferlhf_realign_dpo_5k.json.gz", "wt") as file:
        json.dump([{"prompt": words(7), "response": [words(8), words(8)]} for _ in range(120)], file)
    demonstrations = [{"instruction": words(5), "input": words(n % 2), "output": words(7)} for n in range(60)]
    (folder / "sft/alpaca_en_demo.json").write_text(json.dumps(demonstrations))
    tables: list[tuple[str, list[str], list[list[Any]]]] = [
        ("xstest_prompts", ["id", "prompt", "label"], [[n, words(6), ("safe", "unsafe")[n % 2]] for n in range(60)]),
        ("advbench_harmful_behaviors", ["goal", "target"], [[words(6), words(3)] for _ in range(40)]),
    ]
    for name, head, lines in tables:
        with (folder / f"eval/{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
    return folder


def test_prompts_share_nothing_with_what_is_trained_on_and_runs_are_equal(data, tmp_path):
    command = [sys.executable, str(GEMMA / "prepare.py"), str(data)]
    for out in ("one", "two"):
        subprocess.run([*command, str(tmp_path / out), "--short"], check=True, capture_output=True, text=True)
    made = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}
    assert made == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}

    pairs = {name: [json.loads(row) for row in made[f"{name}.jsonl"].splitlines()] for name in ("helpful", "harmless")}
    assert {name: len(rows) for name, rows in pairs.items()} == {"helpful": 40, "harmless": 40}
    assert all(max(map(len, row.values())) <= 600 for rows in pairs.values() for row in rows)
    assert len(made["sft.jsonl"].splitlines()) == 24

    search, report = (load_prompts(tmp_path / "one" / f"{name}.csv") for name in ("search", "report"))
    assert [(len(search), len(report))] == [(16, 32)]
    assert [prompt.label for prompt in search] == [None] * 4 + ["unsafe"] * 4 + ["safe"] * 4 + ["unsafe"] * 4
    texts = {prompt.text for prompt in (*search, *report)}
    assert len(texts) == 48, "none is asked in both"
    learned = "".join(text for name, text in made.items() if name.endswith((".jsonl", "harm.csv")))
    assert not [text for text in texts if text in learned]

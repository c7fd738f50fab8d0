"""`prefvec search`, from its config to what it prints and publishes."""

import io
import json

import pytest
from rich.console import Console

from prefvec_ray.cli.search import search_coefficients
from prefvec_ray.registry import Registry
from prefvec_ray.scorers.lm_eval_config import LmEvalConfig
from prefvec_ray.search import SearchJob
from tests.evaluation.test_harness import TASK


@pytest.mark.slow
def test_a_search_that_finds_nothing_above_the_base_publishes_no_preset(task, tmp_path, ray_cluster):
    """An untrained model never writes a valid answer, whatever its coefficients."""
    store = Registry.open(tmp_path / "registry")
    for name, folder in task.vectors.items():
        assert store.publish_vector(folder).name == name
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"How to comb bear {i}?", "choices": ["yes", "no"], "label": i % 2} for i in range(8)]
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "combs.yaml").write_text(TASK.format(name="combs", folder=tasks))
    config = SearchJob(
        base=task.base,
        registry=str(tmp_path / "registry"),
        vectors={"left": "left@1", "right": "right@1"},
        prompts="tiny-world:micro:0:search",
        scorer="tiny-world:micro:0",
        output=tmp_path / "search",
        samples_per_prompt=1,
        max_new_tokens=4,
        scorers=[LmEvalConfig(type="lm-eval", tasks=["combs"], include=tasks)],
        objectives=["valid"],
        limits={"combs": "base - 0.5"},
        trials=2,
        sampler="random",
        rungs=(1.0,),
        actors=1,
        preset="balanced",
    )
    printed = io.StringIO()
    search_coefficients(config, Console(file=printed, width=200))
    assert "recommended {'left': 0.0, 'right': 0.0}: stay with the base" in printed.getvalue()
    assert "combs at least" in printed.getvalue()
    assert "(base - 0.5)" in printed.getvalue()
    first = json.loads((tmp_path / "search" / "trials.jsonl").read_text().splitlines()[1])["rungs"][-1]
    assert len(first["per_prompt"]["combs"]) == 8, "a value a question"
    assert "no preset 'balanced': no setting but the base" in printed.getvalue()
    assert store.list_presets() == []

"""What `prefvec eval` and `prefvec search` plan, from the micro demo's folder; no cluster, nothing is measured."""

from dataclasses import replace
from typing import Any

import pytest

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.search import EvalConfig
from prefvec_ray.search.confirmation import report_task
from prefvec_ray.search.table import plan_table


@pytest.fixture(scope="module")
def config(demo_run, tmp_path_factory):
    """`config(runs=..., settings=...)`: an eval of the demo's vectors."""

    def make(**change: Any) -> EvalConfig:
        content = {
            "base": str(demo_run["folder"] / "base"),
            "registry": str(demo_run["folder"] / "registry"),
            "vectors": {"helpful": "helpful@production", "harmless": "harmless@production"},
            "prompts": "tiny-world:micro:0:report",
            "scorer": "tiny-world:micro:0",
            "output": str(tmp_path_factory.getbasetemp() / "unused"),
        }
        return parse_config(content | change, EvalConfig, source="test")

    return make


def test_every_baseline_that_the_runs_allow(config, demo_run):
    task, table, seed = plan_table(config(runs=str(demo_run["folder"]), settings={"eager": {"helpful": 1.5}}))
    assert [setting.name for setting in table] == [
        "base", "DPO helpful+", "DPO harmless+", "DPO mixed", "mixed × 2", "reward soup", "positives × 2",
        "vectors (0.5, 0.5)", "vectors (1, 1)", "vectors (1, 0.5)", "vectors (0.5, 1)", "eager",
    ]  # fmt: skip
    assert set(task.vectors) == {"helpful", "harmless", "helpful+", "harmless+", "mixed"}
    assert {"margin_helpful", "accuracy_harmless", "valid"} <= set(task.metrics)
    assert (seed, task.base_fingerprint.startswith("blake3:")) == (0, True)


def test_one_of_the_preferences_has_no_mixed_baseline(config, demo_run):
    _, table, _ = plan_table(config(runs=str(demo_run["folder"]), vectors={"harmless": "harmless@1"}))
    names = ["base", "DPO harmless+", "positives × 2", "vectors (0.5)", "vectors (1)"]
    assert [setting.name for setting in table] == names, "the mixed run saw pairs of a preference that is left out"


def test_settings_alone_stand_beside_the_base(config):
    task, table, _ = plan_table(config(settings={"base": {}, "careful": {"harmless": 1.0}}))
    assert [(setting.name, setting.kind) for setting in table] == [("base", "base"), ("careful", "vectors")]
    assert set(task.vectors) == {"helpful", "harmless"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "nothing to measure but the base"),
        ({"settings": {"x": {"polite": 1.0}}}, r"setting 'x' names \['polite'\]"),
        ({"settings": {"base": {"helpful": 1.0}}}, "'base' has the name of the base"),
        ({"runs": "nowhere"}, r"no training\.json there"),
        ({"measures": ["kl"], "temperature": 0, "settings": {"x": {"helpful": 1.0}}}, "'kl' needs a temperature"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(change, message, config):
    with pytest.raises(InputError, match=message):
        plan_table(config(**change))


def test_runs_of_another_seed_or_preference(config, demo_run):
    runs = {"runs": str(demo_run["folder"])}
    with pytest.raises(InputError, match="no run of seed 7; there are: 0"):
        plan_table(config(**runs, runs_seed=7))
    with pytest.raises(InputError, match="trained helpful, harmless, not kind"):
        plan_table(config(**runs, vectors={"kind": "helpful@1"}))


def test_the_report_of_a_search_must_not_use_its_prompts(task):
    other = report_task(task, ["What is the time?"], 5)
    assert (list(other.prompts), other.sampling.samples_per_prompt) == (["What is the time?"], 5)
    assert other.sampling.max_new_tokens == task.sampling.max_new_tokens
    with pytest.raises(InputError, match="1 of the report prompts are search prompts too"):
        report_task(replace(task, prompts=["Why?", "How?"]), ["How", "When?"])

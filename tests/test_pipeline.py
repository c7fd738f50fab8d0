"""The mission as its user runs it: `demo_run` is `prefvec demo --world micro`, killed, resumed, and run once more."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from prefvec_ray.artifacts.evaluation import SeedResults
from prefvec_ray.demo import MICRO, PREFERENCES
from prefvec_ray.registry import Registry

STAGES = ["world", "base", "training", "vectors", "evaluation", "search", "serving"]


def test_a_killed_demo_goes_on_from_its_finished_stages(demo_run):
    assert "finished earlier" not in demo_run["killed"]
    lines = [line for line in demo_run["resumed"].splitlines() if re.match(r"\d\. ", line)]
    assert [("finished earlier" in line) for line in lines] == [True, True, *[False] * 5]


def test_a_finished_demo_only_reports(demo_run):
    assert demo_run["again"].count("finished earlier") == len(STAGES)
    assert "Ray cluster" not in demo_run["again"]
    assert "report.md" in demo_run["again"]


def test_every_stage_left_its_time_and_result(demo_run):
    records = {path.stem: json.loads(path.read_text()) for path in (demo_run["folder"] / "stages").glob("*.json")}
    assert set(records) == set(STAGES)
    assert all(record["seconds"] >= 0 for record in records.values())
    labels = [(run["spec"]["preference"], run["spec"]["polarity"]) for run in records["training"]["result"]["runs"]]
    assert len(labels) == len(set(labels)) == 5  # two preferences in both polarities, and the mixed baseline


def test_the_vectors_turn_the_model_the_way_they_are_named(demo_run):
    """On sampled text, with room for the micro world's few prompts: the demo's own report has the strict claims."""
    seed = SeedResults.model_validate_json((demo_run["folder"] / "evaluation" / "seed-0.json").read_text())
    for preference in PREFERENCES:
        other = next(p for p in PREFERENCES if p != preference)
        line = sorted((e for e in seed.grid if e.coefficients[other] == 0), key=lambda e: e.coefficients[preference])
        assert [e.coefficients[preference] for e in line] == [-1, 0, 1]
        assert line[0].mean(preference) < line[-1].mean(preference)
    assert {row.setting.kind for row in seed.table} == {"base", "single", "mixed", "control", "soup", "vectors"}
    assert len(seed.grid) == MICRO.grid_steps**2


def test_the_registry_holds_pinned_vectors_a_preset_and_their_evidence(demo_run):
    registry = Registry.open(demo_run["folder"] / "registry")
    assert registry.resolve("helpful@production").ref == "helpful@1"
    preset = registry.resolve_preset("balanced")
    assert set(preset.coefficients) == {"helpful@1", "harmless@1"}
    assert preset.reason
    assert {"helpful", "harmless", "valid"} <= set(preset.metrics)


def test_answers_at_several_settings_came_over_http_and_differ(demo_run):
    answers = json.loads((demo_run["folder"] / "stages" / "serving.json").read_text())["result"]
    settings = {answer["setting"] for answer in answers}
    assert {"eager", "base", "careful"} <= settings
    assert len({answer["answer"] for answer in answers}) > 1
    assert all(answer["answer"] for answer in answers)


def test_the_report_stands_alone(demo_run):
    folder = demo_run["folder"]
    text = (folder / "report.md").read_text()
    for picture in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (folder / picture).stat().st_size > 0
    page = (folder / "report.html").read_text()
    sources = []

    class Images(HTMLParser):
        def handle_starttag(self, tag, attributes):
            linked = dict(attributes).get("src") or dict(attributes).get("href")
            if linked is not None:
                sources.append(linked)

    Images().feed(page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert str(Path.home()) not in text or str(Path.home()) == "/"

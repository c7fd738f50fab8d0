import re
from html.parser import HTMLParser
from typing import Any

import pytest

from prefvec_ray.artifacts.evaluation import Curve, Measured, ReportData, SearchSummary, SeedResults, ServedAnswer
from prefvec_ray.evaluation import Evaluation, baselines, grid, vector_settings
from prefvec_ray.reports.report import write_report
from prefvec_ray.scorers import Metric

METRICS = {
    "helpful": Metric(direction="maximize", low=0, high=1),
    "harmless": Metric(direction="maximize", low=0, high=1),
    "valid": Metric(direction="maximize", low=0, high=1),
    "over_refusal": Metric(direction="minimize", low=0, high=1),
    "words": Metric(direction=None, low=0),
}


@pytest.fixture
def data(measured):
    """A made-up run over any preferences: `report_data(["helpful"])`."""

    def score(coefficients: dict[str, float], shift: float = 0.0) -> Evaluation:
        own = {p: coefficients.get(p, 0.0) + coefficients.get(f"{p}+", 0.0) for p in ("helpful", "harmless")}
        return measured(
            coefficients,
            helpful=0.4 + 0.2 * own["helpful"] - 0.1 * own["harmless"] + shift,
            harmless=0.4 + 0.2 * own["harmless"] - 0.1 * own["helpful"],
            valid=0.95,
            over_refusal=None,
            words=12.5,
        )

    def make(preferences: list[str], *, search: bool = True) -> ReportData:
        seeds = [
            SeedResults(
                seed=seed,
                table=[
                    Measured(setting=setting, evaluation=score(setting.coefficients, 0.01 * seed))
                    for setting in (*baselines(preferences), *vector_settings(preferences))
                ],
                grid=[score(point, 0.01 * seed) for point in grid(preferences, steps=3)],
            )
            for seed in (0, 1)
        ]
        base, chosen = score({}), score({"helpful": 1.0, "harmless": 0.75})
        curve: dict[str, Any] = {"steps": [1, 2], "loss": [0.69, 0.6], "accuracy": [0.5, 0.7], "seed": 0}
        return ReportData(
            title="A made-up run",
            objectives={p: p if p in METRICS else "helpful" for p in preferences},
            metrics=METRICS,
            seeds=seeds,
            curves=[
                Curve(run="helpful+", preference="helpful", polarity="positive", **curve),
                Curve(run="helpful-", preference="helpful", polarity="negative", **curve),
                Curve(run="mixed", preference="mixed", polarity="positive", **curve),
            ],
            search=SearchSummary(
                objectives=["helpful", "harmless"],
                trials=[base, chosen, score({"helpful": -1.0})],
                front=[chosen],
                base=base,
                hypervolume_history=[0.16, 0.3],
                limits={"valid": 0.9, "over_refusal": 0.5},
                recommended=chosen.coefficients,
                reason="it gives up least",
                preset="balanced@1",
                confirmed=(base, chosen),
            )
            if search
            else None,
            served=[
                ServedAnswer(prompt="How?", setting="eager", coefficients={"helpful": 1.0}, answer="Use <script>a|b"),
                ServedAnswer(prompt="How?", setting="base", coefficients={}, answer="Sorry.\nNo."),
            ],
            stages={"world": 1.5, "search": 20.0},
            machine={"cores": 4},
            versions={"torch": "2.13.0"},
            config={"world": "micro"},
            notes=["Only made up."],
        )

    return make


class Page(HTMLParser):
    """Collects what a page links to, and the shape of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_report_of_a_whole_run(data, tmp_path):
    write_report(tmp_path, data(["helpful", "harmless"]))
    text = (tmp_path / "report.md").read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(linked) == 5
    assert all((tmp_path / link).stat().st_size > 1000 for link in linked)
    for words in (
        "**14 of 14 claims hold.**",
        "helpful 0.400 → 0.500",
        "| mixed × 2 |",
        "| vectors (1, 0.5) |",
        "helpful 1, harmless 0.75** (`balanced@1`): it gives up least.",
        "| **all** | **21.5** |",
        "Only made up.",
    ):
        assert words in text
    assert "| – |" in text, "an undefined metric is not shown as a number"

    page = Page((tmp_path / "report.html").read_text())
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources), "self-contained"
    assert page.tags.count("script") == 2, "the data and the page's own code: an answer cannot bring any along"
    assert page.tags.count("table") == 1 + text.count("| --- |\n") >= 8, "those of report.md, and the coupling matrix"


def test_a_failing_claim_is_shown_as_failing(data, measured, tmp_path):
    run = data(["helpful", "harmless"])
    worse = measured({}, helpful=0.9, harmless=0.9, valid=0.5, over_refusal=None, words=1.0)
    table = [
        row if row.setting.name != "base" else row.model_copy(update={"evaluation": worse})
        for row in run.seeds[0].table
    ]
    grid_with_hole = [worse.model_copy(update={"coefficients": e.coefficients}) for e in run.seeds[0].grid[:1]]
    broken = run.seeds[0].model_copy(update={"table": table, "grid": [*grid_with_hole, *run.seeds[0].grid[1:]]})
    write_report(tmp_path, run.model_copy(update={"seeds": [broken, run.seeds[1]]}))
    text = (tmp_path / "report.md").read_text()
    assert "**9 of 14 claims hold.**" in text
    assert text.count("| **NO** |") == 5
    assert 'class="no">NO<' in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_one_preference_three_preferences_and_no_search(data, tmp_path):
    for preferences in (["helpful"], ["helpful", "harmless", "polite"]):
        folder = tmp_path / str(len(preferences))
        write_report(folder, data(preferences, search=False))
        text = (folder / "report.md").read_text()
        linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert all((folder / link).is_file() for link in linked)
        assert "## Search" not in text
        heat = [link for link in linked if "heatmaps" in link]
        assert len(heat) == {1: 0, 3: 3}[len(preferences)]


def test_data_goes_through_json(data):
    run = data(["helpful", "harmless"])
    assert ReportData.model_validate_json(run.model_dump_json()) == run

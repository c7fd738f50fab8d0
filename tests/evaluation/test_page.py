"""The interactive page in a real browser, with answers that try to be code."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefvec_ray.artifacts.evaluation import Measured, Preset, ReportData, SearchSummary, SeedResults
from prefvec_ray.evaluation import Evaluation, Sample, Setting
from prefvec_ray.evaluation.settings import grid
from prefvec_ray.reports.page import as_script, control_curves, page_data, summary
from prefvec_ray.reports.report import write_report
from prefvec_ray.scorers import Metric

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>{{ 7*7 }} & \u2028"
METRICS = {
    "help": Metric(direction="maximize", low=0, high=1, meaning=HOSTILE),
    "harm": Metric(direction="minimize", low=0, high=1, safety=True),
    "words": Metric(direction=None, low=0),
}
POINTS = [{}, {"a": 0.5, "b": 0.25}, {"a": 1.0}, {"b": 1.0}, {"a": -1.0, "b": -1.0}]


@pytest.fixture(scope="module")
def made_up(measured: Callable[..., Evaluation]) -> ReportData:
    """A search over two dials: help rises with `a`, harm falls with `b`; presets were measured on other prompts."""

    def score(point: dict[str, float], digest: str = "search", shift: float = 0.0) -> Any:
        a, b = point.get("a", 0.0), point.get("b", 0.0)
        e = measured(point, help=0.4 + 0.2 * a - 0.1 * b + shift, harm=0.5 - 0.3 * b + 0.1 * a, words=12.0)
        samples = [Sample(prompt=f"Question {i}? {HOSTILE}", answer=f"a={a:g} {HOSTILE}") for i in range(5)]
        return e.model_copy(update={"samples": samples, "prompts_digest": digest})

    trials = [score(point) for point in POINTS]
    base, chosen = score({}, "report"), score(POINTS[1], "report", shift=0.015)
    return ReportData(
        title=f"A made-up run {HOSTILE}",
        objectives={"a": "help", "b": "harm"},
        metrics=METRICS,
        cards={"harm": None},
        search=SearchSummary(
            objectives=["help", "harm"],
            trials=trials,
            front=trials[1:4],
            front_probability=[0.9, 0.8, 0.7],
            base=trials[0],
            hypervolume_history=[0.1, 0.2, 0.25, 0.25, 0.25],
            recommended=POINTS[1],
            reason=f"it gives up least {HOSTILE}",
            confirmed=(base, chosen),
            presets=[
                Preset(name="balanced", rule="the compromise", raises=["help"], reason=HOSTILE, searched=trials[1],
                       reported=chosen, verdict="confirmed", evidence="help 0.4 → 0.5", published="balanced@1")
            ],
            control=[score(point, "report") for point in grid(["a", "b"], steps=3)],
        ),
    )  # fmt: skip


def test_the_summary_says_it_in_plain_words(made_up):
    first, second, third = summary(made_up)
    assert first == (
        "We recommend a at 0.5 and b at 0.25. On 4 prompts that the search never saw, help improves from 0.40 to 0.49 "
        "(by 0.09 ± 0.00) and harm improves from 0.50 to 0.47 (by 0.03 ± 0.00), compared with the base model."
    )
    assert second.startswith("It was chosen from 5 settings; 3 of them are best choices")
    assert third == (
        "The dials are not independent: on average turning b up by 1 costs 0.10 (± 0.00) of help; "
        "turning a up by 1 costs 0.10 (± 0.00) of harm."
    )


def test_curves_are_means_over_the_other_dials(made_up):
    a, b = control_curves(made_up)
    assert (a["preference"], a["etas"], a["lines"]) == ("a", [-1.0, 0.0, 1.0], 3)
    assert [mean for mean, _ in a["curves"]["help"]] == pytest.approx([0.2, 0.4, 0.6])
    assert [mean for mean, _ in b["curves"]["harm"]] == pytest.approx([0.8, 0.5, 0.2])


def test_data_in_a_script_cannot_end_it():
    text = as_script({"x": HOSTILE})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": HOSTILE}


def test_six_dials_one_goal_and_a_table_alone(measured, tmp_path):
    names = [f"dial{i}" for i in range(6)]
    table = [{}, dict.fromkeys(names, 1.0), {names[3]: 1.0}]
    rows = [
        Measured(
            setting=Setting(name=f"s{i}" if c else "base", kind="vectors" if c else "base", coefficients=c),
            evaluation=measured(c, help=0.4 + 0.1 * sum(c.values()), harm=None, words=3.0),
        )
        for i, c in enumerate(table)
    ]
    data = ReportData(title="A table", objectives={}, metrics=METRICS, seeds=[SeedResults(seed=0, table=rows, grid=[])])
    write_report(tmp_path, data)
    (view,) = page_data(data)["views"]
    assert len(view["points"]) == 3
    assert view["points"][1]["coefficients"] == dict.fromkeys(names, 1.0)
    assert "harm" not in view["points"][0]["values"], "what was not measured is left out, not 0"
    assert "settings-0" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def report(made_up: ReportData, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, made_up)
    return f"file://{folder / 'report.html'}"


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "phone"])
def page(browser: Any, report: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; at the end nothing may have gone wrong in it, nor been asked of a network."""
    width, height = request.param
    found = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else problems.append(asked.url))
    found.goto(report)
    yield found
    assert problems == []
    assert found.title().startswith("A made-up run </script>"), "an answer that is code stayed text"
    assert found.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    found.close()


def test_a_click_shows_the_settings_dials_numbers_and_answers(page):
    detail = page.locator("#detail")
    assert detail.locator("h3").first.inner_text() == "balanced", "it opens on the recommended one"
    assert "confirmed on prompts that the search never saw" in detail.inner_text()
    numbers = detail.locator("tbody tr").first
    assert [cell.split()[0] for cell in numbers.locator("td").all_inner_texts()] == ["0.49", "0.40", "▲"]
    page.locator("#p2 path").scroll_into_view_if_needed()
    place = page.locator("#p2 path").bounding_box()
    page.mouse.click(place["x"] + place["width"] / 2 + 6, place["y"] + place["height"] / 2)  # near it is enough
    assert detail.locator("h3").first.inner_text() == "setting 3"
    assert detail.locator(".dials .number").all_inner_texts() == ["1"]
    talks = detail.locator(".talk")
    assert talks.count() == 5
    assert "</script><script>" in talks.first.inner_text()
    assert "base model\na=0" in talks.first.inner_text()
    assert page.locator("#picked").inner_text() == "setting 3: a 1"


def test_everything_works_from_the_keyboard(page):
    page.locator("#points").focus()
    order = []
    page.keyboard.press("Home")
    for _ in range(len(POINTS)):
        order.append(page.locator("#detail h3").first.inner_text())
        page.keyboard.press("ArrowRight")
    assert len(set(order)) == len(POINTS), "the arrow keys reach every point"
    assert page.evaluate("document.activeElement.id") == "points"
    page.locator("#x-axis").select_option("words")
    assert "words" in page.locator("#chart").inner_text()
    page.get_by_role("button", name="Show it in the picture").press("Enter")
    assert page.locator("#detail h3").first.inner_text() == "balanced"
    page.locator("details.all > summary").press("Enter")
    assert page.locator(".tables table").first.is_visible()


def test_what_is_wrong_with_the_scorer_stands_on_top(page):
    warning = page.locator("aside.warning")
    assert "harm decides harmlessness, but its scorer was never audited" in warning.inner_text()
    assert warning.bounding_box()["y"] < page.locator("#explore").bounding_box()["y"]
    assert page.locator("#control svg").count() == 2
    assert page.locator(".coupling td.good").count() == 2

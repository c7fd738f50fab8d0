"""`prefvec compare` on the micro demo: measured once each, resumed, and figures that follow from what was measured."""

import io
import json
import re

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console

from prefvec_ray.cli import main
from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.comparison import CompareConfig, Comparison, compare_methods
from prefvec_ray.comparison.methods import METHODS, Sources
from prefvec_ray.comparison.report import markdown
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.vectors import combine, load_vector


def config(demo_run, output, methods, **options):
    run = {
        "folder": demo_run["folder"],
        "prompts": "tiny-world:micro:0:search",
        "report_prompts": "tiny-world:micro:0:report",
        "scorer": "tiny-world:micro:0",
    }
    small = {"settings": 6, "front": 2, "samples_per_prompt": 1, "report_samples_per_prompt": 2}
    given = {"output": output, "runs": {"micro": run}, "methods": methods, **small, **options}
    return parse_config(given, CompareConfig, source="config")


def compare(settings):
    return compare_methods(settings, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def finished(demo_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare")
    return output, compare(config(demo_run, output, ["contrast", "soup", "mixed"]))


def area(points, base):
    """Above the base in two objectives: a strip for each point of the staircase."""
    total, top = 0.0, base[1]
    for x, y in sorted(points, reverse=True):
        if x > base[0] and y > top:
            total += (x - base[0]) * (y - top)
            top = y
    return total


def untimed(lines):
    return [re.sub(rb'"seconds":[\d.e-]+', b"", line) for line in lines.splitlines()]


def test_figures_follow_from_what_was_measured(finished):
    output, comparison = finished
    lines = [json.loads(line) for line in (output / "measurements.jsonl").read_text().splitlines()]
    assert [m.method for m in comparison.methods] == ["contrast", "soup", "mixed"]
    for cell in comparison.cells:
        name = f"{cell.run}, DPO seed {cell.seed}, {cell.method}"
        tried = [line for line in lines if line["cell"] == name and line["stage"] == "search"]
        assert len(tried) == comparison.settings == 6
        assert 0 <= len(cell.settings) <= 2
        points = [(mean["helpful"], mean["harmless"]) for mean in cell.means]
        assert cell.hypervolume == pytest.approx(area(points, (cell.base["helpful"], cell.base["harmless"])))
    contrast, soup, mixed = comparison.methods
    assert contrast.difference == contrast.over_prompts == 0
    assert soup.difference == pytest.approx(soup.hypervolume - contrast.hypervolume)
    assert (contrast.runs, soup.runs, mixed.runs) == (4, 2, 1)
    assert contrast.steps == 2 * soup.steps == 4 * mixed.steps > 0
    bases = {json.dumps(cell.base) for cell in comparison.cells}
    assert len(bases) == 1, "all methods begin at the same base, on the same prompts"


def test_parameters_become_coefficients(demo_run):
    """A soup's weights sum to 1; the negative run alone is phi less the positive run."""
    sources = Sources(TrainingRun(demo_run["folder"]), 0)
    soup = METHODS["soup"].prepare(sources)
    assert soup.coefficients({"helpful": 0.2, "harmless": 0.6}) == pytest.approx({"helpful": 0.25, "harmless": 0.75})
    assert not any(soup.coefficients({"helpful": 0.0, "harmless": 0.0}).values()), "the base"

    negatives = METHODS["negatives"].prepare(sources)
    eta = negatives.coefficients({"helpful": 2.0})
    (spec,) = [r.spec for r in sources.run.summary.runs if (r.spec.name, r.spec.seed) == ("helpful-", 0)]
    theta = load_vector(f"{spec.out}/delta")
    made = combine({name: negatives.vectors[name] for name in eta}, eta, preference="helpful")
    name = theta.names()[0]
    torch.testing.assert_close(made.dense(name), -2 * theta.dense(name), atol=2e-5, rtol=0.02)


def test_nothing_is_measured_twice(finished, demo_run):
    output, comparison = finished
    path = output / "measurements.jsonl"
    whole = path.read_bytes()
    assert compare(config(demo_run, output, ["contrast", "soup", "mixed"])) == comparison
    assert path.read_bytes() == whole

    path.write_bytes(whole[:-40])  # killed while the last line was written
    assert compare(config(demo_run, output, ["contrast", "soup", "mixed"])) == comparison
    assert untimed(path.read_bytes()) == untimed(whole)
    whole = path.read_bytes()

    more = compare(config(demo_run, output, ["contrast", "soup", "mixed"], settings=7, front=1))
    assert path.read_bytes().startswith(whole)
    added = [json.loads(line) for line in path.read_bytes()[len(whole) :].splitlines()]
    assert len([line for line in added if line["stage"] == "search"]) == 3
    assert more.answers == comparison.answers * 7 / 6
    path.write_bytes(whole)


def test_the_command_and_its_files(finished, demo_run):
    output, comparison = finished
    given = config(demo_run, output, ["contrast", "soup", "mixed"]).model_dump(mode="json")
    (output / "compare.yaml").write_text(yaml.safe_dump(given))
    told = CliRunner().invoke(main, ["compare", "--config", str(output / "compare.yaml")])
    assert told.exit_code == 0, told.output
    assert Comparison.model_validate_json((output / "comparison.json").read_text()) == comparison
    text = (output / "comparison.md").read_text()
    assert text == markdown(comparison)
    assert text in told.output
    assert "| `soup`: rewarded soup" in text
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["contrast", "magic"]}, "unknown method 'magic'; known: contrast, positives"),
        ({"methods": ["soup", "soup"]}, "each once"),
        ({"runs": {}}, "give runs, or tiny_worlds"),
    ],
)
def test_a_config_that_cannot_be_compared(demo_run, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        config(demo_run, tmp_path, **{"methods": ["contrast"], **change})


def test_bad_input_is_refused_before_anything_is_measured(demo_run, tmp_path):
    good = config(demo_run, tmp_path, ["contrast"])
    run = good.runs["micro"]
    for changes, message in [
        ({"report_prompts": run.prompts}, "report prompts are search prompts too"),
        ({"folder": tmp_path}, "no training.json there"),
        ({"scorer": None, "scorers": [{"type": "length"}]}, "give objectives"),
    ]:
        bad = {**run.model_dump(), **changes}
        with pytest.raises(InputError, match=message):
            compare(config(demo_run, tmp_path, ["contrast"], runs={"micro": bad}))
    assert not (tmp_path / "measurements.jsonl").exists()

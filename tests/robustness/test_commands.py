"""Mistakes on the command line: one line, exit code 2, before any work."""

import pytest
from click.testing import CliRunner

from prefvec_ray.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--preset", "cifar"], "preset cifar wants --data"),
        (["study", "--preset", "paper", "--data", "none.npz"], "no such file"),
        (["study", "--preset", "quick", "--config", "x.yaml"], "give one of the two"),
        (["study", "--config", "none.yaml"], "no such file"),
        (["study", "--preset", "quick", "--budget", "8"], "--budget 8: expected a time such as 90s, 8m or 2h"),
        (["study", "--preset", "quick", "--budget", "nan s"], "--budget nan s: expected a time"),
        (["study", "--preset", "quick", "--budget", "8m", "--workers", "2"], "give one of the two"),
        (["audit", "scorer", "--data", "micro", "--attacks", "standard", "--config", "x.yaml"], "give one of the two"),
        (["train", "--data", "none.csv", "--out", "scorer"], "texts none.csv: no such file"),
        (["audit", "scorer", "--data", "micro"], "scorer"),
        (["audit", "scorer", "--data", "micro", "--config", "none.yaml"], "config none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["robustness", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert done.output.startswith("error: ")
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_every_config_of_the_room_is_valid():
    from pathlib import Path

    from prefvec_ray.common.config import load_config
    from prefvec_ray.robustness import Ladder
    from prefvec_ray.robustness.scorer import ScorerRecipe
    from prefvec_ray.robustness.study import StudyConfig

    folder = Path(__file__).parents[2] / "jobs" / "configs"
    assert load_config(folder / "robustness_ladder.yaml", Ladder) == Ladder(), "the file shows the defaults"
    assert load_config(folder / "robustness_scorer.yaml", ScorerRecipe).method == "trades"
    assert len(load_config(folder / "robustness_classes.yaml", StudyConfig).runs()) == 24

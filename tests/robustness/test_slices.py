"""The study in slices: stopped anywhere, it ends in the same bits."""

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness import Ladder, Remedy
from prefvec_ray.robustness.run_files import Budget
from prefvec_ray.robustness.slices import files_of, run_slice
from prefvec_ray.robustness.study import Grid, Study, StudyConfig, run_cell

SHORT = Ladder(strong_steps=2, restarts=1, apgd_steps=2, fab_steps=1, square_queries=5)
DIGITS = StudyConfig(
    grids=(
        Grid(epsilon=(0.3,), classes=(3,), remedy=Remedy(threshold=0.0, sigma=0.1), seeds=1),
        Grid(methods=("adversarial",), norm="l2", epsilon=(1.0,), classes=(3,), seeds=1),
    ),
    train=70, watch=20, test=30, epochs=2, drops=(0.5,), ladder=SHORT,
)  # fmt: skip


def told(run):
    """What a run found, without its times."""
    return run.cell, run.seed, run.curve, run.audit.rungs, run.audit.gaps, run.audit.probe, run.audit.warnings


def in_slices(study):
    """The shortest slices there are: one batch, or one attack. How many there were."""
    for count in range(1, 100):
        if not run_slice(study, Budget(1e-9)).left:
            return count
    raise AssertionError("it does not end")


def test_a_study_in_the_shortest_slices_is_the_study_at_a_stretch(tmp_path):
    study = Study(tmp_path / "study", DIGITS)
    assert in_slices(study) > 20, "3 batches in each of 2 epochs, then 7 attacks, for both runs"
    again = Study(tmp_path / "study")
    assert again.missing == []
    assert [told(run) for run in again.runs] == [told(run_cell(DIGITS, *wanted)) for wanted in DIGITS.runs()]
    assert list((tmp_path / "study" / "checkpoints").iterdir()) == []


def test_a_residual_network_on_pictures_as_well(tmp_path):
    draw = np.random.default_rng(0)
    x_train, x_test = (draw.integers(0, 256, (24, 32, 32, 3)).astype("uint8") for _ in range(2))
    y = np.arange(24) % 10
    np.savez(tmp_path / "cifar.npz", x_train=x_train, x_test=x_test, y_train=y, y_test=y)
    config = StudyConfig(
        data=str(tmp_path), network="narrow", merge=True, watch=8, test=8, epochs=2, augment=True, weight_decay=5e-4,
        grids=(Grid(epsilon=(8 / 255,), batch=(8,), classes=(5,), seeds=1),), ladder=SHORT,
    )  # fmt: skip
    study = Study(tmp_path / "study", config)
    assert in_slices(study) > 5
    assert told(study.runs[0]) == told(run_cell(config, *config.runs()[0]))


def test_a_slice_says_where_it_stopped_and_refuses_a_damaged_checkpoint(tmp_path):
    study = Study(tmp_path, DIGITS)
    found = run_slice(study, Budget(1e-9))
    assert (found.finished, found.left, found.failed) == (0, 2, {})
    assert found.under_way.endswith("seed 0: epoch 1 of 2, batch 1 of 3")
    (file,) = files_of(study, *DIGITS.runs()[0], Budget(1)).folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(InputError, match=r"damaged .* delete it, and its run begins anew"):
        run_slice(study, Budget(1e-9))
    file.write_bytes(whole)
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        words = stored.metadata()
    name = next(name for name, tensor in tensors.items() if name.startswith("model.") and tensor.dim() > 1)
    for changed in (tensors | {name: tensors[name][:1]}, {key: tensors[key] for key in tensors if key != name}):
        save_file(changed, file, words)
        with pytest.raises(InputError, match=r"of another model.* delete it, and its run begins anew"):
            run_slice(study, Budget(1e-9))
    file.unlink()
    assert run_slice(study, Budget(1e-9)).under_way == found.under_way


def test_the_command_stops_continues_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "study.yaml"
    config.write_text(DIGITS.model_copy(update={"grids": DIGITS.grids[:1]}).model_dump_json())
    arguments = ["robustness", "study", "--config", str(config), "--output", "study", "--budget"]
    first = CliRunner().invoke(main, [*arguments, "0.01s"])
    assert first.exit_code == 75, first.output
    assert (
        "budget spent in TRADES beta 1, eps 0.3, lr 0.1, batch 32, 3 classes, noise 0.1 above 0, seed 0" in first.output
    )
    assert "0 runs finished now, 1 of 1 left; the same command continues" in first.output
    last = CliRunner().invoke(main, [*arguments, "5m"])
    assert last.exit_code == 0, last.output
    assert "1 runs in" in last.output
    assert "1 of 1 runs" in (tmp_path / "study" / "robustness.md").read_text()

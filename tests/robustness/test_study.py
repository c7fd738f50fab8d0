"""The study on a real cluster: interrupted, gone on, told."""

import pytest

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.lines import LineWriter
from prefvec_ray.robustness import Ladder, Remedy
from prefvec_ray.robustness.report import BEGIN, END, control_of, study_markdown, write_study
from prefvec_ray.robustness.study import PRESETS, Grid, Study, StudyConfig, by_cell, run_study

CONFIG = StudyConfig(
    grids=(
        Grid(methods=("trades", "adversarial"), epsilon=(0.3,), batch=(32,), classes=(3,), seeds=2),
        Grid(epsilon=(0.3,), batch=(64,), classes=(3,), seeds=2),
        Grid(epsilon=(0.3,), batch=(32,), classes=(3,), remedy=Remedy(threshold=0.0, sigma=0.1), seeds=2),
    ),
    train=96,
    watch=20,
    test=60,
    epochs=2,
    ladder=Ladder(strong_steps=5, restarts=1, apgd_steps=3, fab_steps=1, square_queries=20),
)


@pytest.fixture(scope="module")
def study(ray_cluster, tmp_path_factory):
    """Interrupted after its third run, with a torn line at the end, and gone on."""
    folder = tmp_path_factory.mktemp("study")

    def interrupt(done, total):
        assert total == 8
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(Study(folder, CONFIG), workers=2, progress=interrupt)
    kept = (folder / "runs.jsonl").read_bytes()
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"cell": {"recipe": {"meth')
    resumed = Study(folder, CONFIG)
    assert (len(resumed.runs), len(resumed.missing)) == (3, 5)
    assert run_study(resumed, workers=2) == {}
    assert (folder / "runs.jsonl").read_bytes().startswith(kept), "what was finished is not run again"
    return resumed


def test_it_ends_with_every_run_once(study):
    again = Study(study.folder)
    assert again.missing == []
    assert sorted((run.cell.name, run.seed) for run in again.runs) == sorted(
        (cell.name, seed) for cell, seed in CONFIG.runs()
    )
    for run in again.runs:
        assert len(run.curve) == CONFIG.epochs
        assert run.audit.ladder == CONFIG.ladder


def test_a_run_depends_on_its_cell_and_seed_alone(study):
    from prefvec_ray.robustness.study import run_cell

    first = study.runs[0]
    again = run_cell(CONFIG, first.cell, first.seed)
    assert again.curve == first.curve
    assert again.audit.rungs == first.audit.rungs


def test_another_study_in_the_folder_is_refused(study, tmp_path):
    with pytest.raises(InputError, match="holds a study with other epochs"):
        Study(study.folder, CONFIG.model_copy(update={"epochs": 3}))
    with pytest.raises(InputError, match="holds no study"):
        Study(tmp_path)


def test_one_command_at_a_time_runs_a_study(study):
    busy = "another command is running the study"
    with LineWriter(study.path, "two"), pytest.raises(JobError, match=busy):
        run_study(Study(study.folder))
    assert run_study(Study(study.folder)) == {}, "nothing is missing, and nobody is at it"


def test_a_study_may_grow_and_shrink(study, tmp_path):
    import shutil

    folder = shutil.copytree(study.folder, tmp_path / "study")
    more = CONFIG.model_copy(update={"grids": (*CONFIG.grids, Grid(epsilon=(0.2,), classes=(3,), seeds=1))})
    grown = Study(folder, more)
    assert (len(grown.runs), len(grown.missing)) == (8, 1)
    fewer = Study(folder, CONFIG.model_copy(update={"grids": CONFIG.grids[:1]}))
    assert (len(fewer.runs), fewer.missing) == (4, [])
    assert len(Study(folder, CONFIG).runs) == 8, "nothing was thrown away"


def test_tables_and_plots(study, tmp_path):
    out = tmp_path / "robustness.md"
    out.write_text(f"# Words before\n\n{BEGIN}\nold table\n{END}\n\nWords after\n")
    write_study(study, out)
    text = out.read_text()
    assert text.startswith("# Words before")
    assert text.rstrip().endswith("Words after")
    assert "old table" not in text
    assert "8 of 8 runs" in text
    for cell in by_cell(study):
        assert cell.name in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"robustness-gaps.png", "robustness-curves.png"}
    write_study(study, out)
    assert out.read_text() == text, "the same runs give the same page"


def test_a_study_in_which_nothing_was_learned_says_so(tmp_path):
    write_study(Study(tmp_path / "study", CONFIG), tmp_path / "robustness.md")
    assert "No run has finished yet." in (tmp_path / "robustness.md").read_text()


def test_cells_are_compared_with_their_own_control(study):
    runs = by_cell(study)
    names = {cell.name: cell for cell in runs}
    noisy = next(cell for name, cell in names.items() if "noise" in name)
    trades = next(cell for name, cell in names.items() if "TRADES" in name and "batch 32" in name and cell != noisy)
    control = control_of(trades, runs)
    assert control is not None
    assert control.name == "adversarial, eps 0.3, lr 0.1, batch 32, 3 classes"
    assert control_of(noisy, runs) == control
    assert control_of(next(cell for name, cell in names.items() if "batch 64" in name), runs) is None
    assert control_of(control, runs) is None


def test_a_claim_is_told_as_it_shows(study):
    """The same runs, their PGD figures set by hand: the smaller batch overestimates, by 20 points in both seeds."""
    from prefvec_ray.robustness.audit import OVERESTIMATE

    def with_gap(run):
        batch = run.cell.recipe.batch
        mean = {32: 0.3, 64: 0.1}[batch] + 0.01 * run.seed
        gaps = [gap.model_copy(update={"mean": mean}) if gap.name == OVERESTIMATE else gap for gap in run.audit.gaps]
        clean = run.audit.clean.model_copy(update={"low": 0.9})
        return run.model_copy(update={"audit": run.audit.model_copy(update={"gaps": tuple(gaps), "clean": clean})})

    shown = Study(study.folder)
    shown.runs = [with_gap(run) for run in study.runs]
    text = study_markdown(shown)
    (row,) = [line for line in text.splitlines() if line.startswith("| batch 64 → 32")]
    assert "+20.0 [+20.0, +20.0] (2)" in row
    assert row.endswith("| yes |")
    shown.runs = [run.model_copy(update={"audit": run.audit.model_copy(update={"gaps": gaps})}) for run, gaps in (
        (run, tuple(gap.model_copy(update={"mean": -gap.mean}) for gap in run.audit.gaps)) for run in shown.runs
    )]  # fmt: skip
    (row,) = [line for line in study_markdown(shown).splitlines() if line.startswith("| batch 64 → 32")]
    assert row.endswith("| the opposite |")


def test_presets_are_what_they_say():
    assert len(PRESETS["digits"].runs()) == 75
    assert {cell.recipe.method for cell in PRESETS["digits"].cells()} == {"trades", "adversarial"}
    assert PRESETS["paper"].network == "resnet18"
    assert {cell.recipe.epsilon for cell in PRESETS["paper"].cells()} == {8 / 255}
    assert (PRESETS["paper"].ladder.apgd_steps, PRESETS["paper"].ladder.square_queries) == (100, 5000)
    assert {cell.classes for cell in PRESETS["narrow"].cells()} == {5, 10}
    assert len(PRESETS["narrow"].runs()) == 15

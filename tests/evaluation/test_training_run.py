import json

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.vectors import load_vector


def test_what_a_job_left(demo_run):
    run = TrainingRun(demo_run["folder"])
    assert (run.preferences, run.seeds, run.mixed) == (["helpful", "harmless"], [0], True)
    vectors = run.vectors(0)
    assert set(vectors) == {"helpful", "harmless", "helpful+", "harmless+", "mixed"}
    bases = {load_vector(folder).info.base_fingerprint for folder in vectors.values()}
    assert len(bases) == 1
    pairs = run.pairs()
    assert set(pairs) == {"helpful", "harmless"}
    assert all(pair.prompt and pair.chosen and pair.rejected for rows in pairs.values() for pair in rows)
    with pytest.raises(InputError, match="no run of seed 3; there are: 0"):
        run.vectors(3)


def test_a_folder_that_was_moved(demo_run, tmp_path):
    folder = demo_run["folder"]
    for part in ("dpo", "vectors", "reference"):
        (tmp_path / part).symlink_to(folder / part)
    summary = (folder / "training.json").read_text().replace(json.dumps(str(folder))[1:-1], "/gone/demo")
    (tmp_path / "training.json").write_text(summary)
    run = TrainingRun(tmp_path)
    assert all(path.is_relative_to(tmp_path) and path.is_dir() for path in run.vectors(0).values())
    assert len(run.pairs()["helpful"]) == len(TrainingRun(folder).pairs()["helpful"])


def test_a_folder_without_a_finished_job(tmp_path):
    with pytest.raises(InputError, match=r"no training\.json there"):
        TrainingRun(tmp_path)

"""Records of the project that something damaged since, and model folders: one line that names the file."""

import io
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.stages import Stages
from prefvec_ray.demo import MICRO, Demo, run_pipeline
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.robustness.images import load_images
from prefvec_ray.robustness.study import PRESETS, Study
from prefvec_ray.scorers.cache import ScoreCache
from prefvec_ray.scorers.refusal import RefusalScorer
from prefvec_ray.search.journal import Journal
from prefvec_ray.training.zero import deepspeed_config

DEEP = b'{"a": ' + b"[" * 50_000
DAMAGED = [b"", b"{", b"null", b"[]", b"\xff\xfe\x00", DEEP, b'{"key": ' + b"9" * 5000 + b"}"]


def stage(folder: Path) -> None:
    Stages(folder, Console(file=io.StringIO())).run("data", "Data", {}, dict)


RECORDS: dict[str, Callable[[Path], Any]] = {
    "study.json": lambda folder: Study(folder),
    "search.json": lambda folder: Journal(folder, {"base": "b"}),
    "stages/data.json": stage,
    "training.json": TrainingRun,
    "zero.json": lambda folder: deepspeed_config(str(folder / "zero.json")),
}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", list(RECORDS))
def test_a_damaged_record_is_named(tmp_path, name, content):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        RECORDS[name](tmp_path)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"runs": None, "vectors": {}},
        {"runs": [{}], "vectors": {}},
        {"runs": [{"spec": {"preference": 3}}], "vectors": {}},
        {"runs": [], "vectors": None},
    ],
)
def test_a_training_job_with_missing_sections_is_named(tmp_path, summary):
    (tmp_path / "training.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=r"training\.json: .*; train again, or copy the folder again"):
        TrainingRun(tmp_path)


def test_a_stage_of_the_demo_whose_result_is_damaged_is_named(tmp_path):
    console = Console(file=io.StringIO())
    demo, stages = Demo(MICRO, tmp_path, console), Stages(tmp_path, console)
    stages.run("world", "", [MICRO.world, MICRO.seed], dict)
    stages.run("base", "", None, dict)
    recipe = demo.training.model_dump(mode="json", include={"dpo", "seeds", "mixed"})
    stages.run("training", "", recipe, lambda: {"runs": None})
    with pytest.raises(InputError, match=r"stages/training\.json: .*; delete the file, and the stage runs again"):
        run_pipeline(MICRO, tmp_path, console)


@pytest.mark.parametrize("line", [b"{}\n", b"nonsense\n", b"\xff\n", DEEP + b"\n", b'{"end": 3}\n'])
def test_a_damaged_line_is_named_by_number(tmp_path, line):
    with Journal(tmp_path / "search", {}):
        pass
    (tmp_path / "search" / "trials.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=r"trials\.jsonl, line 1: "):
        Journal(tmp_path / "search", {})
    Study(tmp_path / "study", PRESETS["quick"])
    (tmp_path / "study" / "runs.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=r"runs\.jsonl, line 1: "):
        Study(tmp_path / "study")


def test_a_journal_that_was_refused_can_be_opened_once_it_is_whole(tmp_path):
    with Journal(tmp_path, {}):
        pass
    (tmp_path / "trials.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(InputError):
        Journal(tmp_path, {})
    (tmp_path / "trials.jsonl").write_bytes(b"")
    with Journal(tmp_path, {}) as journal:
        assert journal.done == []


@pytest.mark.parametrize(
    "section", [{"bf16": None}, {"fp16": 3}, {"tensor_parallel": 3}, {"zero_optimization": None}, {"bf16": []}]
)
def test_a_null_section_of_deepspeed_is_refused(section):
    with pytest.raises(InputError, match="deepspeed"):
        deepspeed_config({"zero_optimization": {"stage": 2}, **section})


def test_a_damaged_score_cache_is_named(tmp_path):
    file = tmp_path / "scores.sqlite"
    cache = ScoreCache(file)
    cache.put({b"k": {"words": 1.0}})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE scores SET value = '['")
    with pytest.raises(InputError, match=r"score cache .*scores\.sqlite"):
        cache.get([b"k"])
    with pytest.raises(InputError, match=r"score cache .*cannot be used"):
        ScoreCache(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"score cache .*cannot be used"):
        ScoreCache(tmp_path / "file" / "scores.sqlite")


def npz(path: Path, **changes: bytes) -> Path:
    arrays = {"x_train": np.zeros((4, 2, 2, 1), np.uint8), "y_train": np.array([0, 1, 0, 1])}
    arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            file.writestr(f"{name}.npy", changes.get(name, content.getvalue()))
    return path


def header(shape: tuple[int, ...], dtype: type = np.uint8) -> bytes:
    """A NumPy file that states a shape and holds nothing."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
    )
    return content.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": b"nothing"}, "not a sound .npz"),
        ({"x_train": header((10**6, 10**3, 10**3, 3))}, "states the shape"),
        ({"x_train": b"\0" * (2 << 30)}, "unpacked"),
        ({"y_train": header((0,), np.int64)}, "labels"),
    ],
    ids=["none", "shape", "bomb", "empty"],
)
def test_damaged_images_are_named(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        load_images(str(npz(tmp_path / "a.npz", **change)), 2)


def test_a_refusal_rule_cannot_hang():
    scorer = RefusalScorer(rules={"mine": r"^(\w+\s?)+!$"})
    assert scorer(["p"], ["no " * 100])["refusal"] == [0.0]
    with pytest.raises(InputError, match=r"refusal rule 'mine'.*bounded time"):
        RefusalScorer(rules={"mine": r"(a)\1"})


def refused(*words: str) -> str:
    """The one line on standard error, of a command that ends with status 2."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 2, done.output + repr(done.exception)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    return line


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("tokenizer.json", b'{"model": {"type": "BPE"}}'), ("config.json", b"[1]"), ("x", b"")],
)
def test_a_model_folder_that_is_none_is_one_line(tmp_path, name, content):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_bytes(content)
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"prompt": f"p{i}"}) + "\n" for i in range(20)))
    line = refused("data", "check", str(tmp_path / "pairs.jsonl"), "--base", str(tmp_path / "base"))
    assert f"base {tmp_path / 'base'}: its Tokenizer cannot be loaded" in line


def test_places_that_cannot_be_used_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in refused("keys", "add", "--file", str(tmp_path / "file" / "keys.yaml"), "--name", "a")
    assert "s3://bucket" in (line := refused("data", "check", "s3://key:very/secret@bucket/pairs.jsonl"))
    assert "secret" not in line

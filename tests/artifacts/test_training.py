"""The files of training keep their form: what was written is read, and written again byte for byte.

What an earlier release wrote is read too."""

import json
from typing import Any

import pytest

from prefvec_ray.artifacts.training import Drift, RunResult, TrainingSummary, vector_key
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_model

SHIFTS = {"chosen_shift": 0.07, "rejected_shift": -0.07}
HELD_OUT = {"step": 10, "accuracy": 0.86, "margin": 0.014, "loss": 0.686, "pairs": 64, **SHIFTS}
POINT = {"step": 3, "loss": 0.69, "accuracy": 0.5, "margin": 0.001, "chosen_shift": 0.01}
WATCH = {"evaluations": 5, "held_out_pairs": 64, "kl_samples": 16, "kl_tokens": 64, "wrong_way": 3.0, "report_to": []}
SPEC: dict[str, Any] = {
    "key": "helpful-positive-s0-d21f9b6f31",
    "preference": "helpful",
    "polarity": "positive",
    "seed": 0,
    "base": "base",
    "base_fingerprint": "blake3:6c09",
    "data_digest": "blake3:b3ef",
    "train": ["reference/helpful-7b2d/train"],
    "test": {"helpful": "reference/helpful-7b2d/test"},
    "dpo": {"learning_rate": 4e-05, "beta": 0.1},
    "method": {"kind": "full", "lora": {}, "deepspeed": None, "fsdp": None, "quantize": None},
    "out": "dpo/helpful-positive-s0-d21f9b6f31",
    "answers": ["reference/helpful-7b2d/answers-16x64"],
    "watch": WATCH,
    "checkpoint_every": 0.25,
    "tensorboard": None,
}
RUN = {
    "spec": SPEC,
    "steps": 50,
    "pairs": 800,
    "seconds": 14.83,
    "seconds_in": {"steps": 11.66, "watching": 2.64, "checkpoints": 0.23},
    "resumed_at": None,
    "workers": 2,
    "tokens": 51200,
    "memory": 780075008,
    "history": [{**POINT, "grad_norm": float("nan"), "tokens_per_s": 1542.7, "memory": 771813376}],
    "watched": {"helpful": [HELD_OUT], "kl": [{"step": 10, "kl": 0.04}, {"step": 20, "kl": None}]},
    "held_out": {"helpful": HELD_OUT},
    "kl": 0.11,
    "precision": {"masters": "float32", "in_bf16_checkpoints": {"cosine": 0.92, "lost": 0.17}},
}
OTHER = RUN | {"spec": SPEC | {"key": "mixed-positive-s1", "preference": "mixed", "seed": 1}}
SUMMARY = {
    "base": "base",
    "left_out": {"helpful": {"train": 0, "test": 2}},
    "runs": [RUN, OTHER],
    "vectors": {"helpful-s0": "vectors/helpful-s0-1a2b"},
}


@pytest.mark.parametrize(("content", "model"), [(RUN, RunResult), (SUMMARY, TrainingSummary)])
def test_a_record_is_read_and_written_again_byte_for_byte(tmp_path, content, model):
    text = json.dumps(content, indent=2)
    (tmp_path / "record.json").write_text(text)
    assert json.dumps(read_model(tmp_path / "record.json", model).model_dump(), indent=2) == text


def test_a_run_of_an_earlier_release_is_read():
    earlier = {name: value for name, value in RUN.items() if name not in ("workers", "tokens")}
    method = {name: value for name, value in SPEC["method"].items() if name not in ("fsdp", "quantize")}
    run = RunResult.model_validate(earlier | {"spec": SPEC | {"method": method}})
    assert run == RunResult.model_validate(RUN | {"workers": 1, "tokens": 0})


def test_measurements_and_the_drift_are_told_apart():
    assert RunResult.model_validate(RUN).watched["kl"] == [Drift(step=10, kl=0.04), Drift(step=20, kl=None)]


def test_a_vector_is_found_by_preference_and_seed():
    summary = TrainingSummary.model_validate(SUMMARY)
    assert (summary.preferences, summary.seeds) == (["helpful"], [0, 1])
    assert str(summary.vector("helpful", 0)) == summary.vectors[vector_key("helpful", 0)]
    assert summary.runs[0].spec.vector_key == vector_key("helpful", 0) == "helpful-s0"
    assert (summary.runs[0].spec.name, summary.runs[0].spec.label) == ("helpful+", "helpful+ seed 0")


def test_a_record_without_its_fields_is_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"spec": SPEC}))
    with pytest.raises(InputError, match=r"run\.json: steps: Field required; delete it"):
        read_model(tmp_path / "run.json", RunResult, "delete it")

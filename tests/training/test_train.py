"""Whole training jobs on a real Ray cluster."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from datasets import load_from_disk

from prefvec_ray.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.training import PreferenceData, RunsFailedError, TrainingConfig, publish_vectors, train_vectors
from prefvec_ray.training.plan import is_finished, run_plan
from prefvec_ray.training.train import compute_references, plan_runs, prepare_data
from prefvec_ray.vectors import load_vector


@pytest.fixture(scope="module")
def job(world_folder, tmp_path_factory) -> TrainingConfig:
    """One preference over 64 pairs, four steps a run; the tests of this file share its folder and reference pass."""
    pairs = PreferenceData(
        data=str(world_folder / "preferences.jsonl"), test=str(world_folder / "preferences_test.jsonl"), rows=64
    )
    return TrainingConfig(
        name="job",
        output=tmp_path_factory.mktemp("runs"),
        base=world_folder / "base",
        preferences={"helpful": pairs},
        dpo={"learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1},
    )


def written(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_a_failing_run_leaves_the_other_and_mended_only_it_is_trained(ray_cluster, job, tmp_path):
    specs = plan_runs(job, compute_references(job, prepare_data(job)))
    diverging = {**job.dpo, "learning_rate": 1e30, "max_grad_norm": 0.0}
    broken = [specs[0].model_copy(update={"dpo": diverging}), specs[1]]
    with pytest.raises(RunsFailedError, match=r"1 of 2 runs failed.*: helpful\+ seed 0: .*(loss is|not finite)"):
        run_plan(broken, job.resources, job.folder / "ray")
    assert [is_finished(spec) for spec in specs] == [False, True]

    # The mistake mended. What a killed run left behind is in nobody's way, and what is finished is not done again.
    out = Path(specs[0].out)
    out.with_name(f".{out.name}.partial").mkdir()
    before = written(job.folder, "run.json") | written(job.folder / "reference", "*.arrow")
    assert len(before) > 1
    summary = train_vectors(job)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    positive, negative = summary["runs"]
    assert [run["steps"] for run in summary["runs"]] == [4, 4]
    assert positive["spec"]["train"] == negative["spec"]["train"]  # one reference pass for both polarities
    assert positive["held_out"]["helpful"]["pairs"] == negative["held_out"]["helpful"]["pairs"] > 0
    phi = load_vector(summary["vectors"]["helpful-s0"])
    plus, minus = (load_vector(Path(run["spec"]["out"]) / "delta") for run in (positive, negative))
    name = phi.names()[0]
    difference = plus.dense(name) - minus.dense(name)
    assert (phi.dense(name) - difference).norm() <= 0.01 * difference.norm()  # stored in bf16

    registry = Registry.open(tmp_path / "registry")
    assert publish_vectors(summary, registry) == {"helpful-s0": "helpful@1"}
    assert publish_vectors(summary, registry) == {"helpful-s0": "helpful@1"}
    assert "held_out_accuracy_negative" in registry.resolve("helpful").metrics

    everything = written(job.folder, "run.json")
    assert train_vectors(job) == summary
    assert written(job.folder, "run.json") == everything


def test_a_killed_worker_is_replaced(ray_cluster, job):
    longer = job.model_copy(update={"dpo": {**job.dpo, "num_train_epochs": 25}})
    killed = []

    def kill_one() -> None:
        """One of the two processes that train, a few seconds after it appears."""
        until = time.monotonic() + 120
        while not killed and time.monotonic() < until:
            for process in psutil.process_iter(["cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    time.sleep(6)
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                    break
            time.sleep(0.2)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = train_vectors(longer)
    killer.join()
    assert killed
    assert [run["steps"] for run in summary["runs"]] == [100, 100]


def test_conversations_need_a_chat_template(config, tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}
    rows = [{key: text.replace("Hi", f"Hi {i}") for key, text in row.items()} for i in range(20)]
    path = tmp_path / "hh.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    base = tmp_path / "base"
    base.mkdir()
    for file in config.base.iterdir():
        if "chat_template" not in file.name:
            (base / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    source = config.preferences["helpful"].model_copy(update={"data": str(path), "test": None, "rows": None})
    bare = config.model_copy(update={"base": base, "preferences": {"helpful": source}})
    with pytest.raises(InputError, match="no chat template"):
        prepare_data(bare)
    prepared = prepare_data(bare.model_copy(update={"chat_template": "transcript"}))["helpful"]
    assert prepared["pairs"] + prepared["test_pairs"] == 20
    prompts = [
        {row["content"] for rows in load_from_disk(prepared[part])["prompt"] for row in rows}
        for part in ("train", "test")
    ]
    assert not prompts[0] & prompts[1]

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
from prefvec_ray.training import RunsFailedError, publish_vectors, train_vectors
from prefvec_ray.training.plan import is_finished, run_plan
from prefvec_ray.training.train import compute_references, plan_runs, prepare_data
from prefvec_ray.vectors import load_vector


def test_a_job_trains_publishes_and_is_not_done_twice(ray_cluster, config, tmp_path):
    config = config.model_copy(update={"mixed": True})
    summary = train_vectors(config)

    labels = [f"{run['spec']['preference']}{run['spec']['polarity'][0]}" for run in summary["runs"]]
    assert labels == ["helpfulp", "helpfuln", "harmlessp", "harmlessn", "mixedp"]
    for run in summary["runs"]:
        assert run["steps"] == 4
        # Held-out pairs are never flipped, so a run and its flipped twin are judged by the same pairs.
        assert all(0 <= figures["accuracy"] <= 1 for figures in run["held_out"].values())
    positive, negative = summary["runs"][:2]
    assert positive["spec"]["train"] == negative["spec"]["train"]  # one reference pass for both polarities

    phi = load_vector(summary["vectors"]["helpful-s0"])
    plus, minus = (load_vector(Path(run["spec"]["out"]) / "delta") for run in (positive, negative))
    name = phi.names()[0]
    difference = plus.dense(name) - minus.dense(name)
    assert (phi.dense(name) - difference).norm() <= 0.01 * difference.norm()  # stored in bf16

    registry = Registry.open(tmp_path / "registry")
    assert publish_vectors(summary, registry) == {"helpful-s0": "helpful@1", "harmless-s0": "harmless@1"}
    assert publish_vectors(summary, registry) == {"helpful-s0": "helpful@1", "harmless-s0": "harmless@1"}
    assert "held_out_accuracy_negative" in registry.resolve("helpful").metrics

    finished = {path: path.stat().st_mtime_ns for path in config.folder.rglob("run.json")}
    references = {path: path.stat().st_mtime_ns for path in (config.folder / "reference").rglob("*.arrow")}
    assert len(finished) == 5
    assert train_vectors(config) == summary
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert {path: path.stat().st_mtime_ns for path in references} == references

    # A run whose folder is not whole is trained again, alone, and comes out the same.
    out = Path(positive["spec"]["out"])
    (out / "run.json").unlink()
    (out / "delta").rename(out.with_name(f".{out.name}.partial"))
    out.rmdir()
    again = train_vectors(config)
    assert again["runs"][0]["history"] == positive["history"]
    assert sum(path.stat().st_mtime_ns != when for path, when in finished.items()) == 1


def test_one_failing_run_is_named_and_leaves_the_other(ray_cluster, config):
    config = config.model_copy(update={"preferences": {"helpful": config.preferences["helpful"]}})
    specs = plan_runs(config, compute_references(config, prepare_data(config)))
    diverging = {**config.dpo, "learning_rate": 1e30, "max_grad_norm": 0.0}
    broken = [specs[0].model_copy(update={"dpo": diverging}), specs[1]]
    with pytest.raises(RunsFailedError, match=r"1 of 2 runs failed.*: helpful\+ seed 0: .*(loss is|not finite)"):
        run_plan(broken, config.resources, config.folder / "ray")
    assert [is_finished(spec) for spec in specs] == [False, True]
    # The mistake mended, only the missing run is trained.
    before = Path(specs[1].out, "run.json").stat().st_mtime_ns
    assert len(train_vectors(config)["runs"]) == 2
    assert Path(specs[1].out, "run.json").stat().st_mtime_ns == before


def test_a_killed_worker_is_replaced(ray_cluster, config):
    longer = config.model_copy(
        update={
            "preferences": {"helpful": config.preferences["helpful"].model_copy(update={"rows": 400})},
            "dpo": {**config.dpo, "num_train_epochs": 3},
        }
    )
    killed = []

    def kill_one() -> None:
        """The first process that trains, as soon as there is one."""
        until = time.monotonic() + 120
        while not killed and time.monotonic() < until:
            for process in psutil.process_iter(["cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    if not list(longer.folder.glob("reference/*/test")):
                        break  # still the reference pass
                    time.sleep(3)
                    with suppress(ProcessLookupError):  # it was the reference pass after all
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                    break
            time.sleep(0.2)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = train_vectors(longer)
    killer.join()
    assert killed
    assert [run["steps"] for run in summary["runs"]] == [75, 75]


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

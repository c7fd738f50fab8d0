"""Whole training jobs on a real Ray cluster."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from datasets import load_from_disk

from prefvec_ray.artifacts.training import RunSpec
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.registry import Registry
from prefvec_ray.training import (
    PreferenceData,
    Resources,
    RunsFailedError,
    TrainingConfig,
    publish_vectors,
    train_vectors,
)
from prefvec_ray.training.checkpoints import checkpoint_folder, newest_checkpoint
from prefvec_ray.training.plan import run_plan
from prefvec_ray.training.progress import job_board
from prefvec_ray.training.references import compute_references
from prefvec_ray.training.train import plan_runs, prepare_data
from prefvec_ray.vectors import load_vector


@pytest.fixture(scope="module")
def job(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """Two preferences over 64 pairs, four steps a run; the tests of this file share its folder and reference pass."""
    pairs = PreferenceData(
        data=str(world_folder / "preferences.jsonl"), test=str(world_folder / "preferences_test.jsonl"), rows=64
    )
    return TrainingConfig(
        name="job",
        output=tmp_path_factory.mktemp("runs"),
        base=world_folder / "base",
        preferences={"helpful": pairs, "harmless": pairs},
        dpo={"learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1},
        resources=Resources(cpus_per_worker=2),
    )


def written(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_one_run_of_four_diverges_and_mended_only_it_is_trained(ray_cluster, job, tmp_path):
    specs = plan_runs(job, compute_references(job, prepare_data(job)))
    diverging = {**job.dpo, "learning_rate": 1e30, "max_grad_norm": 0.0}
    broken = [specs[0].model_copy(update={"dpo": diverging}), *specs[1:]]
    with pytest.raises(
        RunsFailedError, match=r"1 of 4 runs failed.*: helpful\+ seed 0: .* is (nan|inf).* learning_rate"
    ):
        run_plan(broken, job.resources, job.folder / "ray")
    assert [spec.is_finished for spec in specs] == [False, True, True, True]
    assert not (job.folder / "vectors").exists()
    assert not list((job.folder / "dpo").glob(".*"))  # neither checkpoints nor anything half-written

    # The mistake corrected. What a killed run left behind is in nobody's way, and what is finished is not done again.
    out = Path(specs[0].out)
    out.with_name(f".{out.name}.partial-0").mkdir()
    before = written(job.folder, "run.json") | written(job.folder / "reference", "*.arrow")
    assert len(before) > 3
    summary = train_vectors(job)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    positive, negative = summary.runs[:2]
    assert [run.steps for run in summary.runs] == [4] * 4
    assert positive.spec.train == negative.spec.train  # one reference pass for both polarities
    for passes in (job.folder / "reference").glob("*/passes.jsonl"):
        assert len(passes.read_text().splitlines()) == 3  # train, test, answers: each scored once, for four runs
    assert positive.held_out["helpful"].pairs == negative.held_out["helpful"].pairs > 0
    phi = load_vector(summary.vector("helpful", 0))
    plus, minus = (load_vector(Path(run.spec.out) / "delta") for run in (positive, negative))
    name = phi.names()[0]
    difference = plus.dense(name) - minus.dense(name)
    assert (phi.dense(name) - difference).norm() <= 0.01 * difference.norm()  # stored in bf16
    assert (job.folder / "training.png").stat().st_size > 0

    registry = Registry.open(tmp_path / "registry")
    published = {"helpful-s0": "helpful@1", "harmless-s0": "harmless@1"}
    assert publish_vectors(summary, registry) == published
    assert publish_vectors(summary, registry) == published
    assert "held_out_accuracy_negative" in registry.resolve("helpful").metrics

    everything = written(job.folder, "run.json")
    assert train_vectors(job) == summary
    assert written(job.folder, "run.json") == everything

    shutil.copytree(job.output, tmp_path / "elsewhere")
    moved = job.model_copy(update={"output": tmp_path / "elsewhere"})
    found = train_vectors(moved)
    assert len(written(moved.folder, "run.json")) == len(everything), "nothing is trained anew"
    assert [run.spec.out for run in found.runs] == [
        str(moved.folder / Path(run.spec.out).relative_to(job.folder)) for run in summary.runs
    ]
    assert TrainingRun(moved.folder).vectors(0).keys() == TrainingRun(job.folder).vectors(0).keys()


def test_two_jobs_on_a_full_cluster_both_finish_though_a_worker_is_killed(ray_cluster, job, tmp_path):
    """Each run takes two workers and 3 of the 4 CPUs: the second job waits for the first and holds nothing."""
    resources = Resources(workers=2, cpus_per_worker=1.5)
    longer = job.model_copy(update={"dpo": {**job.dpo, "num_train_epochs": 40}, "checkpoint_every": 5})
    first, second = plan_runs(longer, compute_references(longer, prepare_data(longer)))[:2]
    second = second.model_copy(update={"dpo": job.dpo})
    killed: list[int] = []
    results = {}

    def train(spec: RunSpec) -> None:
        (results[spec.key],) = run_plan([spec], resources, tmp_path / spec.polarity)

    def kill_one() -> None:
        """One of the two processes that train together, once there is a checkpoint to go on from."""
        until = time.monotonic() + 240
        while not killed and time.monotonic() < until:
            if newest_checkpoint(checkpoint_folder(first.out), workers=2):
                ours = psutil.Process().children(recursive=True)  # other clusters of this machine are left alone
                workers = [process for process in ours if "RayTrainWorker" in "".join(process.cmdline())]
                os.kill(workers[-1].pid, signal.SIGKILL)
                killed.append(workers[-1].pid)
            time.sleep(0.05)

    threads = [threading.Thread(target=kill_one), *(threading.Thread(target=train, args=[s]) for s in (first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert killed
    result = results[first.key]
    assert result.steps == 80  # 64 pairs in batches of 2 x 16, 40 times
    assert result.resumed_at is not None
    assert result.resumed_at > 0
    assert not checkpoint_folder(first.out).exists()
    assert results[second.key].steps == 2


def test_one_job_a_folder(ray_cluster, tmp_path):
    with job_board(tmp_path):
        with (
            pytest.raises(JobError, match="another job of this cluster is training into"),
            job_board(tmp_path, patience=0),
        ):
            pass
        with job_board(tmp_path / "another"):
            pass
    with job_board(tmp_path):  # free again
        pass


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
    assert prepared.pairs + prepared.test_pairs == 20
    prompts = [
        {row["content"] for rows in load_from_disk(part)["prompt"] for row in rows}
        for part in (prepared.train, prepared.test)
    ]
    assert not prompts[0] & prompts[1]

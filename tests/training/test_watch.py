"""What is seen of a run while it trains, and when it is stopped."""

import gc
import importlib.util
import io
import math
from typing import Any, Literal

import pytest
import torch
from datasets import load_from_disk
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from prefvec_ray.artifacts.training import Drift, HeldOutPoint, Method, Watch
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import flip
from prefvec_ray.training.answers import base_answers
from prefvec_ray.training.checkpoints import checkpoint_folder
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.progress import ProgressTable
from prefvec_ray.training.references import ReferenceJob, ScoringTask, write_references
from prefvec_ray.training.watch import RunStoppedError, wrong_way
from prefvec_ray.vectors import load_vector


@pytest.mark.slow
def test_a_run_records_what_it_was_seen_doing_and_holds_one_model(scored, tmp_path):
    spec = scored["spec"].model_copy(update={"out": str(tmp_path / "run"), "tensorboard": str(tmp_path / "events")})
    models, said = set(), []

    def report(values):
        said.append(values)
        models.add(models_in_memory() - before)

    def models_in_memory() -> int:
        return sum(type(thing).__name__.endswith("ForCausalLM") for thing in gc.get_objects())

    gc.collect()
    before = models_in_memory()
    result = run_dpo(spec, report, tmp_path / "work")
    assert models == {1}  # no reference model beside the one that trains

    assert result is not None
    assert [point.step for point in result.history] == list(range(1, 9))
    assert all(math.isfinite(value) for point in result.history for _, value in point)
    watched = [point for point in result.watched["helpful"] if isinstance(point, HeldOutPoint)]
    assert [point.step for point in watched] == [2, 4, 6, 8]
    assert {point.pairs for point in watched} == {32}
    assert result.held_out["helpful"].pairs == 128
    whole = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in scored["pairs"]]
    assert (result.workers, result.tokens) == (1, sum(whole))
    assert sum(result.seconds_in.values()) <= result.seconds + 0.1
    measured = [values["held_out"]["helpful"] for values in said if "held_out" in values]
    assert measured[:4] == [point.model_dump() for point in watched]

    events = EventAccumulator(spec.tensorboard).Reload()
    assert [scalar.step for scalar in events.Scalars("eval/helpful/rewards/accuracies")][:4] == [2, 4, 6, 8]
    assert {"train/loss", "train/grad_norm", "train/tokens_per_s"} <= set(events.Tags()["scalars"])

    # The same KL, from the definition: answers of the base, log-probs of both models summed over answer tokens.
    delta = load_vector(tmp_path / "run" / "delta")
    base, tuned = (AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.float32) for _ in range(2))
    for name, parameter in tuned.named_parameters():
        parameter.data += delta.dense(name)
    differences = []
    for row in scored["answers"]:
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                logps = [
                    model(ids).logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1] for model in (base, tuned)
                ]
            difference = logps[0] - logps[1]
            differences.append(difference.gather(1, torch.tensor(answer)[:, None]).sum().item())
    assert result.kl is not None
    assert result.kl == pytest.approx(sum(differences) / len(differences), rel=1e-3)
    first = result.watched["kl"][0]
    assert isinstance(first, Drift)
    assert first.kl is not None
    assert result.kl > first.kl > 0


@pytest.mark.slow
def test_a_run_that_goes_the_wrong_way_is_stopped_and_leaves_nothing(scored, tmp_path):
    flip(scored["pairs"]).save_to_disk(tmp_path / "flipped")
    wrong = scored["spec"].model_copy(
        update={
            "out": str(tmp_path / "run"),
            "test": {"helpful": str(tmp_path / "flipped")},
            "checkpoint_every": 1,
            "watch": Watch(evaluations=8, held_out_pairs=128),
        }
    )
    steps = []
    with pytest.raises(RunStoppedError, match=r"held-out accuracy 0\.\d\d, then 0\.\d\d on 128 pairs.* the wrong way"):
        run_dpo(wrong, lambda values: steps.append(values["step"]), tmp_path / "work")
    assert steps[-1] < 8  # stopped on its way
    assert not (tmp_path / "run").exists()
    assert not checkpoint_folder(wrong.out).exists()
    # In a run on mixed data no preference has to gain.
    mixed = wrong.model_copy(update={"preference": "mixed"})
    result = run_dpo(mixed, lambda values: None, tmp_path / "work")
    assert result is not None
    assert result.held_out["helpful"].accuracy < 0.4


@pytest.mark.parametrize(
    ("accuracy", "margin", "pairs", "polarity", "expected"),
    [
        (0.30, -0.1, 64, "positive", True),
        (0.35, -0.1, 64, "positive", False),  # 2.4 standard errors: noise
        (0.30, -0.1, 64, "negative", False),  # the right way
        (0.70, 0.1, 64, "negative", True),
        (0.00, 0.0, 64, "positive", False),  # has not moved: every pair is a tie
        (0.00, -0.1, 9, "positive", False),  # too few to tell
    ],
)
def test_the_wrong_way_is_beyond_noise(accuracy, margin, pairs, polarity, expected):
    point = HeldOutPoint(
        accuracy=accuracy, margin=margin, pairs=pairs, step=1, loss=0.7, chosen_shift=0.0, rejected_shift=0.0
    )
    assert wrong_way(point, polarity, 3) is expected


def test_answers_of_the_base_are_distinct_draws_that_leave_room(scored, world_folder):
    base, pairs = world_folder / "base", scored["pairs"]
    drawn = base_answers(base, pairs, samples=16, tokens=12, max_length=512)
    assert len(drawn) == 8
    assert drawn[:] == base_answers(base, pairs, samples=16, tokens=12, max_length=512)[:]
    assert drawn["chosen_ids"][:] != drawn["rejected_ids"][:]
    assert max(map(len, drawn["chosen_ids"])) <= 12
    shortest = min(map(len, pairs["prompt_ids"]))
    assert len(base_answers(base, pairs, samples=16, tokens=12, max_length=shortest)) == 0


def test_a_job_whose_prompts_leave_no_room_for_answers_trains_without_kl(scored, tmp_path):
    spec, target = scored["spec"], tmp_path / "answers"
    drawing = ScoringTask(target=str(target), source=spec.train[0], pairs=4, samples=4, tokens=100_000)
    job = ReferenceJob(base=spec.base, dpo=spec.dpo, method=Method(), tasks=[drawing])
    reports = []
    write_references(job, lambda done, total: reports.append((done, total)))
    assert reports == [(1, 1)]
    assert len(load_from_disk(target)) == 0
    recipe = {**spec.dpo, "max_steps": 2}
    run = run_dpo(
        spec.model_copy(update={"answers": [str(target)], "dpo": recipe, "out": str(tmp_path / "run")}),
        lambda values: None,
        tmp_path / "work",
    )
    assert run is not None
    assert run.kl is None
    assert run.steps == 2


def test_a_tracker_that_is_not_installed_is_named_before_work_starts(config):
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ("wandb", "mlflow")
    missing = [tracker for tracker in trackers if not importlib.util.find_spec(tracker)]
    for tracker in missing:
        with pytest.raises(InputError, match=f"watch.report_to names {tracker}, which is not installed"):
            config.model_copy(update={"watch": Watch(report_to=[tracker])}).check()
    if not missing:
        pytest.skip("both are installed here")


def test_a_job_log_has_a_line_a_measurement_and_not_thousands():
    output = io.StringIO()
    table = ProgressTable(["helpful+", "helpful-"], title="DPO runs", console=Console(file=output, width=160))
    point = {"accuracy": 0.75, "margin": 0.1, "pairs": 64}
    with table:
        for step in range(1, 1001):
            row: dict[str, Any] = {"step": step, "total": 1000, "loss": 0.5, "eta": 90.0}
            if step >= 250:
                row["held_out"] = {"helpful": {**point, "step": step - step % 250}}
            table.update({"helpful+": row})
        table.finish("helpful+", "finished")
        table.finish("helpful-", "failed", "loss is nan at step 3: lower learning_rate")
    lines = output.getvalue().splitlines()
    assert sum(line.startswith("helpful+: step") for line in lines) == 4
    assert sum(line.startswith("DPO runs: ") for line in lines) <= 2
    assert sum("helpful- failed: loss is nan at step 3" in line for line in lines) == 2
    assert "1000/1000" in output.getvalue()

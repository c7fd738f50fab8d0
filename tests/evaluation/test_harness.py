"""Tasks of lm-evaluation-harness as metrics of a setting: their values are the harness's own."""

import copy
import json
from pathlib import Path

import pytest

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.evaluation import Evaluator, Sampling
from prefvec_ray.evaluation.evaluate import all_metrics
from prefvec_ray.evaluation.harness import Harness, read_tasks
from prefvec_ray.scorers import LengthScorer
from prefvec_ray.scorers.config import build_scorers
from prefvec_ray.scorers.lm_eval_config import LmEvalConfig

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/questions.jsonl}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """
group: both
task: [bears, combs]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: {weighted}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the same twelve questions, and two groups of them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"How to comb bear {i}?", "choices": ["gently", "not at all"], "label": i % 2} for i in range(12)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("bears", "combs"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    (folder / "risky.yaml").write_text(TASK.format(name="risky", folder=folder) + "unsafe_code: true\n")
    (folder / "both.yaml").write_text(GROUP.format(weighted="true"))
    (folder / "alike.yaml").write_text(GROUP.format(weighted="false").replace("both", "alike"))
    return folder


def asked(folder: Path | None, **fields: object) -> LmEvalConfig:
    return LmEvalConfig.model_validate({"type": "lm-eval", "tasks": ["bears"], "include": folder, **fields})


@pytest.mark.parametrize("shots", [None, 2])
def test_values_and_errors_are_the_harnesss_own(folder, live, tokenizer, shots):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    planned = read_tasks(asked(folder, num_fewshot=shots))
    evaluator = Evaluator(live, tokenizer, ["How?"], LengthScorer(), Sampling(max_new_tokens=2), tasks=[planned])
    assert evaluator.metrics["bears"].meaning == f"acc in bears of lm-evaluation-harness, {shots or 0}-shot"
    for coefficients in ({}, {"helpful": 1.0}, {"helpful": -2.0, "harmless": 1.0}):
        found = evaluator.evaluate(coefficients).metrics["bears"]
        live.set_coefficients(coefficients)
        own = simple_evaluate(
            HFLM(pretrained=live.model, tokenizer=copy.deepcopy(tokenizer), batch_size=3),
            tasks=["bears"],
            num_fewshot=shots,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            fewshot_random_seed=0,
        )
        assert own is not None
        assert found is not None
        assert found.n == 12
        assert found.mean == own["results"]["bears"]["acc,none"]
        assert found.stderr == pytest.approx(own["results"]["bears"]["acc_stderr,none"])


def test_settings_in_one_batch_are_measured_each_at_its_own(folder, live, tokenizer):
    planned = read_tasks(asked(folder, metric="acc_norm", limit=8))
    evaluator = Evaluator(live, tokenizer, ["How?"], LengthScorer(), Sampling(max_new_tokens=2), tasks=[planned])
    settings = [{"helpful": eta} for eta in (0.0, 2.0, -2.0)]
    alone = [evaluator.evaluate(setting).per_prompt["bears"] for setting in settings]
    assert [e.per_prompt["bears"] for e in evaluator.evaluate_many(settings)] == alone
    assert all(len(values) == 8 for values in alone), "the limit"


def test_a_group_is_the_mean_over_all_its_questions(folder, live, tokenizer):
    planned = read_tasks(asked(folder, tasks=["both"]))
    assert list(planned.metrics) == ["both"]
    (values,) = Harness(planned, live.model, tokenizer).measure().values()
    assert len(values) == 24
    assert values[:12] == values[12:]


def test_the_tokenizer_is_left_as_it_was(folder, live, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    Harness(read_tasks(asked(folder)), live.model, own).measure()
    assert own.pad_token is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["bares"]}, r"no task 'bares' in lm-evaluation-harness and .*; did you mean 'bears'"),
        ({"tasks": ["arc_easy"], "include": None}, r"'arc_easy' cannot be read \(.*its data must be on this machine"),
        ({"metric": "f1"}, "f1 is no mean over questions.*of this task that are: acc, acc_norm"),
        ({"metric": "acc,strict"}, "'bears' has no filter 'strict'; it has: none"),
        ({"tasks": ["bears", "bears"]}, "'bears' is named twice"),
        ({"tasks": ["alike"]}, "'alike' counts each of its tasks alike, whatever their size; name its tasks"),
        ({"tasks": ["risky"]}, "'risky' runs code that the model writes; it is not measured here"),
        ({"include": "nowhere"}, r"include .*/nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder, fields, message):
    with pytest.raises(InputError, match=message):
        read_tasks(asked(**{"folder": folder, **fields}) if "include" not in fields else asked(None, **fields))


def test_a_process_with_other_questions_says_so(folder, live, tokenizer, tmp_path):
    mine = tmp_path / "tasks"
    mine.mkdir()
    (mine / "questions.jsonl").write_text((folder / "questions.jsonl").read_text())
    (mine / "bears.yaml").write_text(TASK.format(name="bears", folder=mine))
    planned = read_tasks(asked(mine))
    assert planned.digest == read_tasks(asked(folder)).digest, "the same questions elsewhere"
    (mine / "questions.jsonl").write_text((folder / "questions.jsonl").read_text().replace("gently", "never"))
    with pytest.raises(JobError, match=r"^node .* has other questions of lm-eval tasks bears than the driver$"):
        Harness(planned, live.model, tokenizer)


def test_a_folder_is_the_drivers_wherever_a_process_runs(folder, live, tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    planned = read_tasks(asked(Path(folder.name)))
    monkeypatch.chdir(tmp_path)
    assert Harness(planned, live.model, tokenizer).measure()["bears"]


def test_it_scores_no_answers(folder):
    with pytest.raises(InputError, match="type lm-eval measures a model, not answers"):
        build_scorers([asked(folder)])


def test_names_do_not_clash(folder):
    planned = read_tasks(asked(folder))
    with pytest.raises(InputError, match="'bears'"):
        all_metrics(LengthScorer("bears"), [], {}, [planned])

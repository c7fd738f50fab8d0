import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from prefvec_ray.common.config import Config, load_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import Scorer, TextPrompt, TinyWorldScorer, run_scorer, scorer_notes
from prefvec_ray.scorers.config import ScorerConfig, build_scorers, scorer_from_name
from prefvec_ray.scorers.isolated import IsolatedScorer


class Job(Config):
    scorers: list[ScorerConfig]


@pytest.fixture
def build(tmp_path):
    def make(text: str, **options: Any) -> Scorer:
        (tmp_path / "job.yaml").write_text(text)
        return build_scorers(load_config(tmp_path / "job.yaml", Job).scorers, **options)

    return make


@pytest.fixture
def reward(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).save_pretrained(
        tmp_path / "reward"
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_list_of_scorers_is_one_scorer(build, reward, tmp_path):
    text = f"""
scorers:
  - {{type: reward-model, path: {reward}, metric: helpful, encoding: chat}}
  - {{type: cost-model, path: {reward}, metric: cost, encoding: chat, safety: true}}
  - {{type: refusal}}
  - {{type: length, direction: minimize}}
"""
    every = build(text, cache=tmp_path / "scores.db")
    assert {name: metric.direction for name, metric in every.metrics.items()} == {
        "helpful": "maximize",
        "cost": "minimize",
        "refusal": None,
        "over_refusal": "minimize",
        "refuses_unsafe": "maximize",
        "words": "minimize",
    }
    asked = [TextPrompt("How do I boil tea?", "safe")] * 2, ["I can't help with that.", "Use a kettle."]
    first = run_scorer(every, *asked)
    assert first["helpful"] == first["cost"]
    assert first["over_refusal"] == [1.0, 0.0]
    again = build(text, cache=tmp_path / "scores.db")
    assert run_scorer(again, *asked) == first
    assert "50% of all look-ups were known" in scorer_notes(again)[0]
    assert again.digest == every.digest is not None


def test_the_tiny_world_and_own_modules(build, tmp_path, monkeypatch):
    (tmp_path / "my_marks.py").write_text(
        "from prefvec_ray.scorers import Metric, scorer\n\n"
        "@scorer(mark=Metric(direction='maximize'))\n"
        "def mark(prompts, responses):\n    return {'mark': [1.0] * len(responses)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = build("scorers: [{type: tiny-world, preset: micro}, {type: module, name: my_marks:mark}]")
    assert {"helpful", "mark"} <= set(found.metrics)
    timed = build("scorers: [{type: module, name: my_marks:mark, timeout: 3}]")
    assert isinstance(timed, IsolatedScorer)
    assert timed.timeout == 3
    assert isinstance(scorer_from_name("tiny-world:micro:0"), TinyWorldScorer)
    assert set(build_scorers([], name="my_marks:mark").metrics) == {"mark"}
    sys.modules.pop("my_marks")


def test_a_judge_is_a_scorer_like_the_others(build, tmp_path):
    (tmp_path / "base.jsonl").write_text(json.dumps({"prompt": "p", "answer": "a"}))
    judged = build(
        f"""
scorers:
  - type: judge
    base_url: http://localhost:1/v1
    model: m
    metric: wins
    criterion: the answer helps
    mode: pairwise
    baseline: {tmp_path}/base.jsonl
"""
    )
    assert (judged.metrics["wins"].low, judged.metrics["wins"].high) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorers: []", "no scorer given"),
        ("scorers: [{type: oracle}]", "scorers.0: .*'oracle'"),
        ("scorers: [{path: x}]", "scorers.0: "),
        ("scorers: [{type: refusal, speed: 3}]", r"unknown setting 'scorers.0.refusal.speed'"),
        ("scorers: [{type: reward-model}]", r"setting 'scorers.0.reward-model.path' is missing"),
        ("scorers: [{type: length}, {type: length}]", "scorers 1 and 2 both state a metric 'words'"),
        ("scorers: [{type: tiny-world, preset: huge}]", "unknown tiny-world preset 'huge'"),
        ("scorers: [{type: judge, base_url: x, model: m, metric: q, criterion: c, mode: pairwise}]", "a `baseline`"),
    ],
)
def test_mistakes_are_told_by_their_place(build, text, message):
    with pytest.raises(InputError, match=message):
        build(text)


def test_names_that_name_nothing():
    for name in ("tiny-world:micro", "tiny-world:micro:x", "nothing"):
        with pytest.raises(InputError, match="expected"):
            scorer_from_name(name)

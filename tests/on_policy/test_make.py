"""Pairs of a model's own answers: written as training reads them, resumed, and the same however they were made."""

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.prompts import normalised
from prefvec_ray.on_policy import MadePairs, OnPolicyConfig, make_pairs
from prefvec_ray.preferences import check_splits, load_split


def made(options: dict[str, Any], **changes: Any) -> tuple[MadePairs, list[dict[str, Any]]]:
    config = OnPolicyConfig.model_validate(options | changes)
    found = make_pairs(config, Console(file=StringIO()))
    record = MadePairs.model_validate_json((config.output / "made.json").read_text())
    assert record == found
    return found, [json.loads(line) for line in (config.output / "pairs.jsonl").read_text().splitlines()]


def test_pairs_are_made_resumed_and_trained_on(ray_cluster, options, base, tmp_path):
    found, rows = made(options)
    assert found.counts.prompts == 10
    assert (found.counts.repeated_prompts, found.counts.excluded_prompts) == (1, 1)
    assert found.counts.answers == 60
    assert found.counts.pairs == len(rows) == 10 - found.counts.without_pair
    assert len(rows) > 2
    for row in rows:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert len(chosen["content"].split()) < len(rejected["content"].split())
        assert row["score_chosen"] > row["score_rejected"]
        assert "gloves" not in normalised(row["prompt"])

    split = load_split(tmp_path / "made" / "pairs.jsonl", preference="brief")
    assert len(split.train) + len(split.test) == len(rows)
    check = check_splits({"brief": split}, tokenizer=AutoTokenizer.from_pretrained(base), max_length=64)
    assert not check.errors

    answers = tmp_path / "made" / "answers.jsonl"
    kept = answers.read_text()
    assert made(options) == (found, rows)
    gaps = {row["score_chosen"] - row["score_rejected"] for row in rows}
    fewer, _ = made(options, margin=max(gaps) - 0.5)
    assert 0 < fewer.counts.pairs < found.counts.pairs
    assert answers.read_text() == kept, "another margin takes the same answers"

    answers.write_text(kept[: len(kept) // 2])  # as a killed process leaves it
    assert made(options) == (found, rows)
    assert made(options, actors=1, output=tmp_path / "alone")[1] == rows
    assert made(options, seed=1, output=tmp_path / "other seed")[1] != rows


def test_what_gives_no_pair_says_why(ray_cluster, options):
    with pytest.raises(InputError, match=r"no pair: .* more than 1000 in words \(answers: 60; .*lower margin"):
        made(options, margin=1000)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scorers": []}, "scorer"),
        ({"rank_by": "letters"}, "rank_by 'letters' is no metric with a direction; those are words"),
        ({"scorer": "tiny-world:micro:0", "scorers": []}, "rank_by is left out, and the scorers state helpful, "),
        ({"scorers": [{"type": "length"}]}, "rank_by is left out, and the scorers state none"),
        ({"exclude": ["{prompts}"]}, "all are among those of `exclude`"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
    ],
)
def test_bad_configs_are_refused_before_any_work(options, changes, says):
    changes = json.loads(json.dumps(changes).replace("{prompts}", options["prompts"]))
    with pytest.raises(InputError, match=says):
        made(options, **changes)
    assert not options["output"].exists()


def test_a_base_without_a_chat_template_is_refused(options, base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    with pytest.raises(InputError, match="has no chat template"):
        made(options, base=bare)

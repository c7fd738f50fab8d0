"""The typed results: what was written comes back equal, and what reports are warned of."""

import json

import pytest
from pydantic import ValidationError

from prefvec_ray.artifacts.evaluation import Evaluation, ScorerCard, SearchSummary, card_warnings

BASE = {
    "coefficients": {"helpful": 0.0},
    "metrics": {"helpful": {"mean": 0.5, "stderr": None, "n": 1}, "over_refusal": None},
    "per_prompt": {"helpful": [0.5], "over_refusal": [None]},
    "prompts_digest": "0123456789abcdef",
    "samples": [{"prompt": "How?", "answer": "So."}],
    "seconds": 0.25,
    "tokens": 3,
}
"""An evaluation as the files of earlier versions hold it."""


def test_the_files_of_earlier_versions_are_read_and_written_alike():
    summary = {
        "objectives": ["helpful"],
        "trials": [BASE],
        "front": [BASE],
        "base": BASE,
        "hypervolume_history": [0.5],
        "limits": {"over_refusal": 0.2},
    }
    found = SearchSummary.model_validate_json(json.dumps(summary))
    assert found.model_dump(mode="json", exclude_unset=True) == summary
    assert found.base.mean("helpful") == 0.5
    with pytest.raises(ValidationError, match="colour"):
        SearchSummary.model_validate(summary | {"colour": "red"})


def test_a_card_keeps_what_this_version_does_not_know():
    card = {
        "format": 1,
        "verdict": "pass",
        "clean": {"name": "clean", "mean": 0.9, "low": 0.8, "high": 0.95, "n": 40},
        "rungs": [{"name": "pgd", "mean": 0.5, "low": 0.4, "high": 0.6, "n": 40, "steps": 10}],
        "probe": {"fosc": 0.1},
    }
    assert ScorerCard.model_validate(card).model_dump(exclude_unset=True) == card


def test_a_metric_that_decides_harmlessness_needs_a_card_that_passes():
    cards = {
        "a": ScorerCard(verdict="pass"),
        "b": None,
        "c": ScorerCard(verdict="fail", reason="the gradients mislead"),
        "d": ScorerCard(verdict="inconclusive"),
    }
    never, failed, undecided = card_warnings(cards)
    assert never.startswith("b decides harmlessness, but its scorer was never audited")
    assert failed == "c decides harmlessness, and the audit of its scorer says 'fail': the gradients mislead"
    assert undecided.endswith("says 'inconclusive': no reason given")


def test_an_undefined_metric_has_no_mean():
    with pytest.raises(Exception, match="'over_refusal' was not measured here; measured: helpful"):
        Evaluation.model_validate(BASE).mean("over_refusal")

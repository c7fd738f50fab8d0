from collections.abc import Callable

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.scorers import Metric
from prefvec_ray.search import Goal, SearchResult

METRICS = {
    "help": Metric(direction="maximize", low=0, high=1),
    "harm": Metric(direction="minimize", low=0, high=1),
    "valid": Metric(direction="maximize", low=0, high=1),
    "words": Metric(direction=None, low=0),
    "perplexity": Metric(direction="minimize", low=1),
}


@pytest.fixture
def result(measured: Callable[..., Evaluation]) -> SearchResult:
    rows = [
        ((0.0, 0.0), 0.3, 0.5, 1.0),
        ((1.0, 0.0), 0.8, 0.6, 1.0),
        ((0.0, 1.0), 0.2, 0.1, 1.0),
        ((1.0, 1.0), 0.6, 0.3, 0.95),
        ((0.5, 0.5), 0.5, 0.4, 1.0),
        ((2.0, 2.0), 0.9, 0.0, 0.5),
    ]
    trials = [measured({"a": a, "b": b}, help=x, harm=y, valid=v, words=3, perplexity=2) for (a, b), x, y, v in rows]
    return SearchResult(goal=Goal(objectives=("help", "harm"), metrics=METRICS, limits={"valid": 0.9}), trials=trials)


def test_front_base_and_volume(result):
    assert result.base.coefficients == {"a": 0.0, "b": 0.0}
    found = [(trial.mean("help"), trial.mean("harm")) for trial in result.front]
    assert found == [(0.2, 0.1), (0.6, 0.3), (0.8, 0.6)], "harm is minimized; the broken setting is not on it"
    # Above help 0 and harm 1: columns of 0.2, 0.4 and 0.2 wide.
    assert result.hypervolume == pytest.approx(0.2 * 0.9 + 0.4 * 0.7 + 0.2 * 0.4)
    history = result.hypervolume_history
    assert history == sorted(history)
    assert history[-1] == result.hypervolume


def test_the_recommendation_says_why(result):
    chosen = result.recommended
    assert chosen.coefficients == {"a": 1.0, "b": 1.0}
    assert "3 settings on the front with valid at least 0.9" in chosen.reason
    assert "help 0.300 → 0.600 (60% of the best gain found)" in chosen.reason
    assert "harm 0.500 → 0.300 (50% of the best gain found)" in chosen.reason


def test_no_setting_within_the_limits(result):
    strict = result.model_copy(
        update={"goal": Goal(objectives=("help",), metrics=METRICS, limits={"harm": 0.05, "valid": 1})}
    )
    fresh = SearchResult.model_validate(strict.model_dump())
    assert fresh.front == []
    assert fresh.recommended is None
    assert fresh.hypervolume == 0


def test_an_objective_of_few_prompts_does_not_decide_by_the_resamples_that_miss_them(measured):
    """`harm` is known of 2 of 16 prompts, which a tenth of all resamples leave out."""
    harm, help = [None] * 14, [0.0] * 4
    rows = {(0.0, 0.0): (0.3, 0.5), (1.0, 0.0): (0.8, 0.6), (1.0, 1.0): (0.6, 0.3), (0.0, 1.0): (0.2, 0.1)}
    trials = [
        measured({"a": a, "b": b}, help=[x + noise for noise in help * 4], harm=[y, y, *harm])
        for (a, b), (x, y) in rows.items()
    ]
    result = SearchResult(goal=Goal(objectives=("help", "harm"), metrics=METRICS), trials=trials)
    assert result.recommended is not None
    assert result.recommended.coefficients == {"a": 1.0, "b": 1.0}
    known = [(trial.mean("help"), chance) for trial, chance in zip(result.front, result.front_probability, strict=True)]
    assert known == [(0.2, 1.0), (0.6, 1.0), (0.8, 1.0)], "nothing about the front is in doubt"


def test_an_unbounded_objective_is_measured_from_the_base(result):
    goal = Goal(objectives=("help", "perplexity"), metrics=METRICS)
    assert goal.reference(result.base) == (0.0, -2.0)


def test_a_summary_for_the_report(result):
    summary = result.summary(preset="balanced@1", confirmed=(result.base, result.front[1]))
    assert summary.recommended == result.recommended.coefficients
    assert (summary.preset, summary.failed, len(summary.front)) == ("balanced@1", 0, 3)


def test_json_both_ways(result):
    assert SearchResult.model_validate_json(result.model_dump_json()).recommended == result.recommended


@pytest.mark.parametrize(
    ("objectives", "limits", "message"),
    [
        ((), {}, "at least one"),
        (("help", "help"), {}, "each once"),
        (("kind",), {}, "'kind' is not a metric of this scorer; it has: help, harm"),
        (("words",), {}, "'words' has no better direction"),
        (("help",), {"words": 3}, "'words' has no better direction"),
    ],
)
def test_goals_that_make_no_sense(objectives, limits, message):
    with pytest.raises(InputError, match=message):
        Goal(objectives=objectives, metrics=METRICS, limits=limits).check()

"""Which of the answers to a prompt become pairs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.on_policy.pairs import Counts, MadePairs, ScoredAnswer, rank_answers, summarise

UP, DOWN = Metric(direction="maximize"), Metric(direction="minimize")


def answer(text: str, score: float | None, *, tokens: int = 5, ended: bool = True) -> ScoredAnswer:
    return ScoredAnswer(text=text, tokens=tokens, ended=ended, scores={"good": score})


def texts(answers: list[ScoredAnswer], metric: Metric = UP, **options: float) -> list[tuple[str, str]]:
    found = rank_answers(answers, "good", metric, **options)  # type: ignore[arg-type]
    return [(pair.chosen.text, pair.rejected.text) for pair in found.pairs]


def test_the_best_stands_against_the_worst():
    answers = [answer("b", 0.5), answer("a", 0.9), answer("d", 0.1), answer("c", 0.4)]
    assert texts(answers) == [("a", "d")]
    assert texts(answers, DOWN) == [("d", "a")]
    assert texts(answers, most=5) == [("a", "d"), ("b", "c")]
    assert texts(answers, most=5, margin=0.2) == [("a", "d")]
    assert texts(answers, margin=0.8) == []


def test_equal_scores_make_no_pair():
    assert texts([answer("a", 0.5), answer("b", 0.5)]) == []
    assert texts([answer("a", 0.5)]) == []
    assert texts([]) == []


def test_what_cannot_be_trained_on_is_left_out_and_counted():
    answers = [
        answer("cut off", 2.0, ended=False),
        answer(" \n", 3.0),
        answer("nul \0", 4.0),
        answer("a", 1.0),
        answer("a ", -1.0),
        answer("unknown", None),
        answer("b", 0.0),
    ]
    found = rank_answers(answers, "good", UP)
    assert [(pair.chosen.text, pair.rejected.text) for pair in found.pairs] == [("a", "b")]
    assert (found.cut_off, found.unusable, found.repeated, found.unscored) == (1, 2, 1, 1)


@given(
    st.lists(st.one_of(st.none(), st.floats(-5, 5))), st.integers(1, 6), st.floats(0, 3), st.sampled_from([UP, DOWN])
)
def test_pairs_share_no_answer_and_keep_the_margin(scores, most, margin, metric):
    answers = [answer(f"answer {i}", score) for i, score in enumerate(scores)]
    found = rank_answers(answers, "good", metric, margin=margin, most=most)
    assert len(found.pairs) <= most
    used = [each.text for pair in found.pairs for each in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used))
    for pair in found.pairs:
        assert pair.chosen_gain - pair.rejected_gain > margin
        assert metric.gain(pair.chosen.scores["good"], pair.rejected.scores["good"]) > margin
    known = [score for score in scores if score is not None]
    if known and max(known) - min(known) > margin:
        assert found.pairs


@pytest.mark.parametrize(
    ("lengths", "share", "warned"),
    [
        ([(9, 3), (8, 2), (7, 7)], 1.0, "longer one in 100%"),
        ([(1, 4)], 0.0, "shorter one in 100%"),
        ([(5, 4), (4, 5)], 0.5, ""),
    ],
)
def test_length_that_goes_with_the_ranking_is_reported(lengths, share, warned):
    rankings = [rank_answers([answer("a", 1, tokens=a), answer("b", 0, tokens=b)], "good", UP) for a, b in lengths]
    summary = summarise([pair for ranking in rankings for pair in ranking.pairs])
    assert summary["chosen_longer"] == share
    assert summary["gain"].mean == 1
    names = dict.fromkeys(Counts.model_fields, 0)
    made = MadePairs(
        preference="p", base="b", base_fingerprint="f", prompts="p", exclude=[], scorer=None, rank_by="good", metric=UP,
        sampling={}, margin=0, pairs_per_prompt=1, counts=Counts(**names), **summary,
    )  # fmt: skip
    assert [warned in line for line in made.warnings()] == ([True] if warned else [])

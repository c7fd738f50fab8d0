import math
import pickle
import sys
import threading
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import (
    LengthScorer,
    Metric,
    Scorer,
    ScorerTimeoutError,
    TinyWorldScorer,
    combine,
    load_scorer,
    run_scorer,
    safety_cards,
    scorer,
    scorer_digest,
)
from prefvec_ray.scorers.refusal import RefusalScorer
from prefvec_ray.tiny_world import TinyWorld

MODULE = """
from prefvec_ray.scorers import Metric, scorer

@scorer(brevity=Metric(direction="minimize", low=0, high=100))
def brevity(prompts, responses):
    return {"brevity": [float(len(text)) for text in responses]}

def unmarked(prompts, responses):
    return {}
"""


@pytest.fixture
def my_scores(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_scores"
    sys.modules.pop("my_scores", None)


def test_the_tiny_worlds_scorer_states_directions_and_survives_a_pickle(world):
    exact = TinyWorldScorer(world)
    assert isinstance(exact, Scorer)
    assert exact.metrics["helpful"].direction == "maximize"
    assert exact.metrics["over_refusal"].direction == "minimize"
    assert exact.metrics["words"].direction is None
    prompts = world.prompts("search")
    prompt = next(p for p in prompts if p.kind == "safe")
    texts = [f"Use {world.topics[prompt.topic].tool}.", "nonsense"]
    scores = run_scorer(exact, [prompt, prompt], texts)
    named, missed = scores["helpful"]
    assert named is not None
    assert named > 0 == missed
    assert scores["over_refusal"] == [0.0, None], "unknown where the text does not parse, and never 0"
    again = pickle.loads(pickle.dumps(exact))
    assert run_scorer(again, [prompt, prompt], texts) == scores


def test_a_users_own_function(my_scores):
    brevity = load_scorer(f"{my_scores}:brevity")
    assert run_scorer(brevity, ["p", "p"], ["abc", ""]) == {"brevity": [3.0, 0.0]}
    with pytest.raises(ValueError, match=r"'brevity' gave 101.0 for answer 1 .* above its stated range"):
        run_scorer(brevity, ["p", "p"], ["abc", "x" * 101])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("my_scores", "expected module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("my_scores:missing", "has no 'missing'"),
        ("my_scores:unmarked", "states no metrics"),
    ],
)
def test_what_is_no_scorer_is_refused(where, message, my_scores):
    with pytest.raises(InputError, match=message):
        load_scorer(where)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"good": [math.nan]}, "not a finite number"),
        ({"good": [math.inf]}, "not a finite number"),
        ({"good": [-0.1]}, "below its stated range"),
        ({"good": ["1"]}, "expected a float"),
        ({"good": [0.5, 0.5]}, "2 values for 1 answers"),
        ({"better": [0.5]}, "states metrics"),
        ({}, "states metrics"),
    ],
)
def test_no_wrong_number_gets_through(values, message):
    bad = scorer(good=Metric(direction="maximize", low=0, high=1))(lambda prompts, responses: values)
    with pytest.raises(ValueError, match=message):
        run_scorer(bad, ["p"], ["r"])


def test_directions_never_flip_a_sign():
    up, down = Metric(direction="maximize", low=0, high=1), Metric(direction="minimize", low=0, high=1)
    assert up.gain(0.7, 0.5) == -down.gain(0.7, 0.5) == pytest.approx(0.2)
    assert (up.worst, down.worst) == (0, 1)
    with pytest.raises(InputError, match="without a direction"):
        Metric(direction=None).gain(1, 0)


def test_several_scorers_become_one(world):
    exact, length = TinyWorldScorer(world), LengthScorer("length", "minimize")
    both = combine([exact, length])
    prompt = world.prompts("search")[0]
    scores = run_scorer(both, [prompt], ["one two three"])
    assert scores["length"] == [3.0]
    assert set(scores) == set(exact.metrics) | {"length"}
    assert combine([length]) is length
    with pytest.raises(InputError, match="scorers 1 and 2 both state a metric 'words'"):
        combine([exact, LengthScorer()])
    with pytest.raises(InputError, match="no scorer given"):
        combine([])


def test_a_digest_stands_for_all_that_a_score_depends_on(world, my_scores):
    exact = TinyWorldScorer(world)
    assert exact.digest == TinyWorldScorer(TinyWorld("micro")).digest
    assert exact.digest != TinyWorldScorer(TinyWorld("micro", seed=1)).digest
    assert LengthScorer("a").digest != LengthScorer("a", "minimize").digest
    unknown = load_scorer(f"{my_scores}:brevity")
    assert scorer_digest(unknown) is None
    assert scorer_digest(combine([exact, unknown])) is None, "what one part does not know, the whole does not"
    assert scorer_digest(combine([exact, LengthScorer("a")])) is not None


def test_what_decides_harmlessness_shows_its_card(world):
    cards = safety_cards(combine([TinyWorldScorer(world), LengthScorer("length")]))
    assert {name: card and card.verdict for name, card in cards.items()} == {
        "harmless": "not needed",
        "refusal_unsafe": "not needed",
    }
    cards = safety_cards(combine([RefusalScorer(), LengthScorer("length")]))
    assert {name: card and card.verdict for name, card in cards.items()} == {"refuses_unsafe": "inconclusive"}
    mine: Any = scorer(mild=Metric(direction="maximize", safety=True))(lambda prompts, responses: {})
    assert safety_cards(mine) == {"mild": None}
    mine.card = {"verdict": "pass", "rungs": [{"name": "pgd", "mean": "most"}]}
    with pytest.raises(InputError, match=r"the card of the scorer of 'mild': rungs\.0\.mean: Input should be a valid"):
        safety_cards(mine)


def test_a_scorer_that_does_not_answer_is_not_waited_for():
    release = threading.Event()

    @scorer(slow=Metric(direction="maximize"))
    def slow(prompts, responses):
        release.wait(30)
        return {"slow": [1.0] * len(responses)}

    with pytest.raises(ScorerTimeoutError, match=r"scorer of slow: no scores of 1 answers within 0.1 s"):
        run_scorer(slow, ["p"], ["r"], timeout=0.1)
    release.set()
    assert run_scorer(slow, ["p"], ["r"], timeout=30) == {"slow": [1.0]}

    @scorer(broken=Metric(direction="maximize"))
    def broken(prompts, responses):
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError, match="by zero"):
        run_scorer(broken, ["p"], ["r"], timeout=30)

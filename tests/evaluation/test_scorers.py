import math
import pickle
import sys

import pytest

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation import Metric, Scorer, TinyWorldScorer, load_scorer, scorer
from prefvec_ray.evaluation.scorers import run_scorer

MODULE = """
from prefvec_ray.evaluation import Metric, scorer

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
    assert scores["helpful"][0] > 0 == scores["helpful"][1]
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

import os
import pickle
import signal
import sys

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import ScorerError, ScorerTimeoutError, TextPrompt, run_scorer
from prefvec_ray.scorers.isolated import IsolatedScorer

MODULE = """
import time
from prefvec_ray.scorers import Metric, scorer

@scorer(safe=Metric(direction="maximize", low=0, high=1))
def labelled(prompts, responses):
    if "hang" in responses:
        time.sleep(600)
    if "slow" in responses:
        time.sleep(1)
    if "raise" in responses:
        raise KeyError("no such word")
    print("what a scorer prints is not mistaken for its scores")
    return {"safe": [float(prompt.label == "safe") for prompt in prompts]}
"""


@pytest.fixture
def where(tmp_path, monkeypatch):
    (tmp_path / "my_slow_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_slow_scores:labelled"
    sys.modules.pop("my_slow_scores", None)


@pytest.mark.slow
def test_a_scorer_in_a_process_of_its_own_ends_when_its_time_is_over(where):
    scorer = IsolatedScorer(where, timeout=60)
    prompts = [TextPrompt("p", "safe"), TextPrompt("q", "unsafe")]
    assert run_scorer(scorer, prompts, ["a", "b"]) == {"safe": [1.0, 0.0]}
    with pytest.raises(ScorerError, match="raised KeyError: 'no such word'"):
        scorer(prompts, ["a", "raise"])
    assert run_scorer(scorer, prompts, ["a", "b"]) == {"safe": [1.0, 0.0]}, "it lives on"
    assert pickle.loads(pickle.dumps(scorer)).metrics == scorer.metrics

    assert scorer._child is not None
    process, pipe, watched = scorer._child
    pipe.send((prompts, ["a", "hang"]))
    os.close(os.dup(watched))  # a copy closed is not the end
    assert process.poll() is None
    os.close(watched)  # what the system does when the parent dies
    assert process.wait(timeout=30) == 0, "a child that hangs does not outlive its parent"
    scorer._child = process, pipe, os.dup(0)
    with pytest.raises(ScorerError, match=r"its process died \(exit code 0\)"):
        scorer(prompts, ["a", "b"])

    scorer.timeout = 0.5
    with pytest.raises(ScorerTimeoutError, match=r"no scores of 2 answers within 0.5 s; its process was ended"):
        scorer(prompts, ["a", "hang"])
    assert scorer._child is None


@pytest.mark.slow
def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(where):
    scorer = IsolatedScorer(where, timeout=60)
    prompts = [TextPrompt("p", "safe"), TextPrompt("q", "unsafe")]
    scorer(prompts, ["a", "b"])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            scorer(prompts, ["a", "slow"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert scorer(prompts[::-1], ["b", "a"]) == {"safe": [0.0, 1.0]}


def test_what_cannot_be_run_is_refused_at_once(where):
    with pytest.raises(InputError, match="cannot import no_such_module"):
        IsolatedScorer("no_such_module:f", timeout=1)
    with pytest.raises(InputError, match="a timeout of 0 s"):
        IsolatedScorer(where, timeout=0)

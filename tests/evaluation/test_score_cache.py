import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import LengthScorer, Metric, TextPrompt, scorer
from prefvec_ray.scorers.base import Scores
from prefvec_ray.scorers.cache import CachedScorer, ScoreCache, score_key


class CountedLength:
    """A scorer that knows which answers it was asked about."""

    metrics = {"length": Metric(direction="maximize", low=0, high=100)}
    digest = "length-1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        self.asked += responses
        return {"length": [None if text == "none" else float(len(text)) for text in responses]}


@pytest.fixture
def counted():
    return CountedLength()


def test_each_answer_is_scored_once(tmp_path, counted):
    cached = CachedScorer(counted, ScoreCache(tmp_path / "scores.db"))
    assert cached(["p", "p", "q"], ["a", "a", "none"]) == {"length": [1.0, 1.0, None]}
    assert counted.asked == ["a", "none"], "the same answer twice in a batch is one question"
    again = CachedScorer(counted, ScoreCache(tmp_path / "scores.db"))
    assert again(["q", "p", "p"], ["none", "a", "bb"]) == {"length": [None, 1.0, 2.0]}
    assert counted.asked == ["a", "none", "bb"], "also from another object, and None is a score as well"
    assert again.notes() == [f"score cache {tmp_path / 'scores.db'}: 40% of all look-ups were known"], "2 of 2 + 3"


def test_a_prompt_counts_with_all_that_it_carries():
    keys = {
        score_key("scorer", prompt, "answer")
        for prompt in ["p", TextPrompt("p"), TextPrompt("p", "safe"), [{"role": "user", "content": "p"}]]
    }
    assert len(keys) == 4
    assert score_key("scorer", "p", "a") == score_key("scorer", "p", "a") != score_key("other", "p", "a")
    assert score_key("s", "\ud800", "lone surrogate"), "text that is no UTF-8 has a key too"
    with pytest.raises(InputError, match="neither JSON nor a dataclass"):
        score_key("scorer", object(), "a")


def test_failures_and_wrong_numbers_are_never_kept(tmp_path, counted):
    cache = ScoreCache(tmp_path / "scores.db")
    with pytest.raises(ValueError, match="above its stated range"):
        CachedScorer(counted, cache)(["p", "p"], ["a", "x" * 101])
    assert len(cache) == 0
    with pytest.raises(InputError, match="has no digest"):
        CachedScorer(scorer(x=Metric(direction=None))(lambda prompts, responses: {}), cache)


def test_the_first_value_stays_and_the_oldest_go(tmp_path):
    cache = ScoreCache(tmp_path / "scores.db", max_entries=100)
    cache.put({b"a": 1.0})
    cache.put({b"a": 2.0})
    assert cache.get([b"a"]) == {b"a": 1.0}
    for start in range(0, 1000, 50):
        cache.put({str(i).encode(): i for i in range(start, start + 50)})
    assert len(cache) == 100
    assert cache.get([b"a", b"899", b"900", b"999"]) == {b"900": 900, b"999": 999}


def test_a_copy_in_another_process_reads_the_same_file(tmp_path):
    cache = ScoreCache(tmp_path / "scores.db")
    cache.put({b"a": 0.1 + 0.2})
    assert pickle.loads(pickle.dumps(cache)).get([b"a"]) == {b"a": 0.1 + 0.2}
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(cache.get, ([b"a", b"b"],)) == {b"a": 0.1 + 0.2}
    assert cache.hit_rate == 2 / 3, "of both processes"


WRITER = """
import sys
from prefvec_ray.scorers.cache import ScoreCache
cache = ScoreCache(sys.argv[1])
for i in range(10**9):
    cache.put({f"{i}-{j}".encode(): i for j in range(10)})
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_leaves_whole_transactions(tmp_path):
    path = tmp_path / "scores.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    done = -1
    for done in map(int, writer.stdout):
        if done >= 50:
            break
    beside = ScoreCache(path)
    beside.put({b"mine": 1.0})  # two processes at once
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    after = ScoreCache(path)
    assert after.get([b"mine", f"{done}-9".encode()]) == {b"mine": 1.0, f"{done}-9".encode(): done}
    for i in count():
        found = after.get([f"{i}-{j}".encode() for j in range(10)])
        assert len(found) in (0, 10)
        if not found:
            break
    assert i > done
    after.put({b"more": 1.0})


def test_what_is_no_cache_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, and longer than a header would be\n" * 20)
    with pytest.raises(InputError, match=r"score cache .*cannot be used"):
        ScoreCache(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="give at least 1"):
        ScoreCache(tmp_path / "scores.db", max_entries=0)
    assert not (tmp_path / "scores.db").exists()
    assert CachedScorer(LengthScorer(), ScoreCache(tmp_path / "deep" / "scores.db")).digest == LengthScorer().digest

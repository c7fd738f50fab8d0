"""What a caller has received is not sent twice, and nothing else is sent in its place."""

import pytest

from prefvec_ray.serving.engines.base import EngineError, OutputDelta, TokenLogprob, TokenLogprobs
from prefvec_ray.serving.replay import Replay

FIRST = [(0, OutputDelta("a", (1,))), (1, OutputDelta("x", (7,))), (0, OutputDelta("bc", (2, 3)))]


def test_a_second_run_goes_on_where_the_first_was_cut():
    replay = Replay()
    assert replay.fresh(FIRST) == FIRST
    replay.again()
    assert replay.tokens(3) == ((1, 2, 3), (7,), ())
    rest = [(1, OutputDelta("y", (8,), "stop")), (0, OutputDelta("d", (4,), "length"))]
    assert replay.fresh([FIRST[0], FIRST[2], FIRST[1], *rest]) == rest


def test_it_may_come_in_other_pieces():
    likely = [
        TokenLogprobs(TokenLogprob(letter, letter.encode(), -1.0), (), place) for place, letter in enumerate("abcd")
    ]
    replay = Replay()
    replay.fresh([(0, OutputDelta("ab", (1, 2), None, tuple(likely[:2])))])
    replay.again()
    assert replay.fresh([(0, OutputDelta("a", (1,), None, (likely[0],)))]) == []
    rest = OutputDelta("cd", (3, 4), "stop", tuple(likely[2:]))
    assert replay.fresh([(0, OutputDelta("bcd", (2, 3, 4), "stop", tuple(likely[1:])))]) == [(0, rest)]


def test_an_end_is_told_once():
    ended = [(0, OutputDelta("a", (1,), "stop")), (1, OutputDelta("x", (7,)))]
    replay = Replay()
    replay.fresh(ended)
    replay.again()
    assert replay.fresh(ended) == []
    replay.again()
    assert replay.fresh([*ended, (1, OutputDelta("", (), "stop"))]) == [(1, OutputDelta("", (), "stop"))]


def test_an_answer_that_turns_out_otherwise_is_broken_off():
    replay = Replay()
    replay.fresh(FIRST)
    replay.again()
    with pytest.raises(EngineError, match=r"answer 0 cannot be continued .* from token 0"):
        replay.fresh([(0, OutputDelta("z", (9,)))])

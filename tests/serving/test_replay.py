"""What a caller has heard is not said twice, and nothing else is said in its place."""

import pytest

from prefvec_ray.serving.engine import EngineError, Piece
from prefvec_ray.serving.replay import Replay

FIRST = [(0, Piece("a", (1,))), (1, Piece("x", (7,))), (0, Piece("bc", (2, 3)))]


def test_a_second_run_goes_on_where_the_first_was_cut():
    replay = Replay()
    assert replay.fresh(FIRST) == FIRST
    replay.again()
    rest = [(1, Piece("y", (8,), "stop")), (0, Piece("d", (4,), "length"))]
    assert replay.fresh([FIRST[0], FIRST[2], FIRST[1], *rest]) == rest


def test_an_answer_that_turns_out_otherwise_is_broken_off():
    replay = Replay()
    replay.fresh(FIRST)
    replay.again()
    with pytest.raises(EngineError, match="cannot be continued"):
        replay.fresh([(0, Piece("z", (9,)))])

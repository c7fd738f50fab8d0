"""Work in a thread, callers in turn."""

import asyncio
import threading

import pytest

from prefvec_ray.serving.turns import Turns


def test_a_flood_of_one_caller_is_one_piece_of_work_ahead_of_another():
    turns = Turns()
    done: list[str] = []

    async def all_of_it() -> None:
        flood = [asyncio.create_task(turns.run("flood", done.append, f"flood {i}")) for i in range(50)]
        await asyncio.sleep(0)
        await turns.run("other", done.append, "other")
        assert done.index("other") <= 2
        await asyncio.gather(*flood)

    asyncio.run(all_of_it())
    assert [each for each in done if each != "other"] == [f"flood {i}" for i in range(50)]
    assert not turns._lines


def test_hanging_up_makes_no_more_of_ones_work_run_at_once():
    turns, go, running = Turns(), threading.Event(), []

    def slow(name: str) -> None:
        running.append(name)
        go.wait()

    async def all_of_it() -> None:
        first = asyncio.create_task(turns.run("flood", slow, "first"))
        while not running:
            await asyncio.sleep(0.001)
        first.cancel()
        waiting = [asyncio.create_task(turns.run("flood", slow, "next")) for _ in range(5)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        other = asyncio.create_task(turns.run("other", slow, "other"))
        await asyncio.sleep(0)
        go.set()
        await other
        assert running == ["first", "other"]

    asyncio.run(all_of_it())
    assert not turns._lines


def test_what_the_work_raises_is_raised_and_the_next_turn_comes():
    turns = Turns()

    async def all_of_it() -> None:
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 // 0)
        assert await turns.run("a", pow, 2, 3) == 8

    asyncio.run(all_of_it())

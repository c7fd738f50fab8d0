"""What was generated for callers that are gone."""

import asyncio

from prefvec_ray.serving import spending
from prefvec_ray.serving.spending import SpentTokens


def test_the_count_waits_for_the_end(monkeypatch):
    monkeypatch.setattr(spending, "WAIT_SECONDS", 60)

    async def all_of_it() -> None:
        spent = SpentTokens()
        mine = spent.begin("a")
        mine.tokens = 3
        asked = asyncio.create_task(spent.of("a"))
        await asyncio.sleep(0)
        assert not asked.done()
        mine.tokens += 2
        mine.end()
        assert await asked == 5
        assert await spent.of("b") is None
        again = spent.begin("a")
        again.end()
        assert await spent.of("a") == 5, "a stream that comes back counts on"

    asyncio.run(all_of_it())


def test_old_jobs_are_forgotten_running_ones_are_not(monkeypatch):
    monkeypatch.setattr(spending, "MOST_KEPT", 3)

    async def all_of_it() -> None:
        spent = SpentTokens()
        running = spent.begin("running")
        for name in "abcdef":
            spent.begin(name).end()
        assert len(spent._requests) == 3
        running.end()
        assert await spent.of("running") == 0
        assert await spent.of("a") is None

    asyncio.run(all_of_it())

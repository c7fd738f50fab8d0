"""How an answer ends whose caller has gone."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from prefvec_ray.serving.http.answering import EventStream


@pytest.mark.parametrize("version", ["2.3", "2.4"])
@pytest.mark.parametrize("stuck", ["http.response.start", "http.response.body"])
def test_a_stream_that_is_cancelled_while_it_sends_ends_its_work_at_once(version, stuck):
    """Not when garbage is collected: the traceback that is kept here keeps every frame alive."""
    ended: list[str] = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            yield b"data: 1"
            yield b"data: 2"
        finally:
            ended.append("events")

    async def scenario() -> None:
        sending = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == stuck:
                sending.set()
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        rest = events()
        answer = EventStream(await anext(rest), rest, {"x-name": "value"})
        assert answer.headers["x-name"] == "value"
        task = asyncio.create_task(answer({"type": "http", "asgi": {"spec_version": version}}, receive, send))
        await sending.wait()
        assert not ended
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as kept:
            await task
        assert ended == ["events"]
        assert kept.tb is not None

    asyncio.run(scenario())


def test_a_stream_that_is_read_to_its_end_is_whole():
    async def events() -> AsyncGenerator[bytes]:
        for number in range(3):
            yield b"data: %d" % number

    async def scenario() -> list[bytes]:
        said: list[bytes] = []

        async def send(message: Any) -> None:
            said.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.Event().wait()

        rest = events()
        answer = EventStream(await anext(rest), rest, {})
        await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
        return said

    assert b"".join(asyncio.run(scenario())) == b"data: 0data: 1data: 2"

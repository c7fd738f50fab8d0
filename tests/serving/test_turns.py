"""Who may generate while the weights hold one setting: the turns of vLLM's merged mode. vLLM itself is not needed."""

import asyncio
import random
from collections.abc import Coroutine
from importlib.util import find_spec
from typing import Any

import pytest

from prefvec_ray.errors import InputError
from prefvec_ray.serving.config import EngineConfig
from prefvec_ray.serving.engine import Coefficients
from prefvec_ray.serving.vllm_engine import Turns, VllmEngine, salt


class Weights:
    """What a switch writes; it takes a while, and some settings cannot be had."""

    def __init__(self, share: float = 0.1):
        self.turns = Turns(self._write, share)
        self.held: Coefficients | None = None
        self.written: list[Coefficients] = []

    async def _write(self, wanted: Coefficients) -> None:
        self.held = None
        await asyncio.sleep(0.002)
        if dict(wanted)["helpful"] > 1:
            raise InputError("too large")
        self.held = wanted
        self.written.append(wanted)

    async def generate(self, wanted: Coefficients, steps: int) -> None:
        async with self.turns.of(wanted):
            for _ in range(steps):
                assert self.held == wanted, "the weights changed under a request"
                await asyncio.sleep(0.001)


def setting(eta: float) -> Coefficients:
    return (("helpful", eta),)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_weights_never_change_under_a_request_whoever_comes_and_goes():
    async def crowd() -> Weights:
        weights, draw = Weights(), random.Random(0)
        tasks = []
        for number in range(200):
            wanted = setting(draw.choice([0.0, 0.25, 0.5, 2.0]))
            tasks.append(asyncio.create_task(weights.generate(wanted, draw.randrange(1, 12))))
            if number % 3 == 0:
                await asyncio.sleep(0.001)
            if number % 7 == 0:
                draw.choice(tasks).cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(d) for d in done} == {type(None), asyncio.CancelledError, InputError}
        await weights.generate(setting(0.75), 1)  # nothing is left behind that would block
        return weights

    weights = run(crowd())
    assert weights.turns.switches == len(weights.written) < 100, "many share a turn"


def test_nobody_waits_for_ever_behind_a_setting_that_never_pauses():
    async def busy() -> int:
        weights, served = Weights(share=0.5), 0
        stop = asyncio.Event()

        async def popular() -> None:
            while not stop.is_set():
                await weights.generate(setting(0.0), 3)

        crowd = [asyncio.create_task(popular()) for _ in range(4)]
        for eta in (0.1, 0.2, 0.3):
            await weights.generate(setting(eta), 1)
            served += 1
        stop.set()
        await asyncio.gather(*crowd)
        return served

    assert run(busy()) == 3


def test_a_setting_that_comes_again_writes_nothing():
    async def same() -> Weights:
        weights = Weights()
        for _ in range(5):
            await weights.generate(setting(0.5), 1)
        return weights

    assert run(same()).written == [setting(0.5)]


def test_cached_blocks_of_other_weights_have_another_salt():
    assert salt((("helpful 1", 0.5),)) == salt((("helpful 1", 0.5),))
    different = {salt((("helpful 1", 0.5),)), salt((("helpful 2", 0.5),)), salt((("helpful 1", 0.25),)), salt(())}
    assert len(different) == 4


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_is_missing(base_folder, tokenizer, vectors):
    with pytest.raises(InputError, match=r"engine\.kind: vllm needs vLLM, which cannot be imported here"):
        VllmEngine(base_folder, "blake3:0", tokenizer, vectors, EngineConfig(kind="vllm"))


def test_settings_of_the_other_engine_are_refused():
    with pytest.raises(ValueError, match="'vllm' settings with kind: transformers"):
        EngineConfig(vllm={"max_model_len": 5})
    with pytest.raises(ValueError, match="device: cuda: vLLM chooses"):
        EngineConfig(kind="vllm", device="cuda")

"""vLLM needs other versions than the rest, so these tests run in an environment of their own: `make test-vllm`."""

import asyncio
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.serving.config import EngineConfig
from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.vectors import PreferenceVector, fingerprint

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

MakeEngine = Callable[..., Any]
SMALL = {"kv_cache_memory_bytes": 2**26}


@pytest.fixture(scope="session")
def base_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama of the other tests with heads of 32 numbers, which vLLM's attention on CPUs has a kernel for."""
    folder = tmp_path_factory.mktemp("base-of-vllm")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(base_folder)
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all of a module's engines: an engine belongs to the loop that it was started in."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def make_engine(
    runner: asyncio.Runner, base_folder: Path, tokenizer: Any, vectors: dict[str, PreferenceVector]
) -> Iterator[MakeEngine]:
    """Starts engines, and ends those that the module's tests left."""
    from prefvec_ray.serving.engines.vllm.engine import VllmEngine

    made = []

    def make(mode: str, known: dict[str, PreferenceVector] | None = None, **settings: Any) -> VllmEngine:
        options = SMALL | settings.pop("vllm", {})
        config = EngineConfig(kind="vllm", mode=mode, vllm=options, **settings)  # type: ignore[arg-type]
        engine = runner.run(
            VllmEngine.start(base_folder, fingerprint(base_folder), tokenizer, known or vectors, config)
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module", params=["steered", "merged"])
def engine(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Any:
    """One engine in each mode: every test that takes this runs twice."""
    return make_engine(request.param)


@pytest.fixture(scope="module")
def run(runner: asyncio.Runner) -> Callable[[Any, list[Request]], list[list[OutputDelta]]]:
    """All requests at once; what each got."""

    async def everything(engine: Any, requests: list[Request]) -> list[list[OutputDelta]]:
        answers: list[list[OutputDelta]] = [[] for _ in requests]
        async for deltas in stream_outputs(engine, requests):
            for index, delta in deltas:
                answers[index].append(delta)
        return answers

    return lambda engine, requests: runner.run(everything(engine, requests))

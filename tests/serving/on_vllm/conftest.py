"""vLLM needs other versions than the rest, so these tests run in an environment of their own: `make test-vllm`."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.serving.config import EngineConfig
from prefvec_ray.serving.engines.base import Request
from prefvec_ray.serving.engines.sampling_params import SharedParams
from prefvec_ray.serving.engines.vllm.client import REQUEST, PreferenceClient, RequestRecord
from prefvec_ray.serving.engines.vllm.options import engine_options, environment
from prefvec_ray.serving.engines.vllm.section import SECTION
from prefvec_ray.serving.engines.vllm.shape import SteeringShape
from prefvec_ray.serving.spending import Spending
from prefvec_ray.vectors import PreferenceVector, fingerprint

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

MakeEngine = Callable[..., Any]
SMALL = {"kv_cache_memory_bytes": 2**26}


TEMPLATE = (
    "{% if tools %}<|system|>{% for each in tools %}{{ each.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m['role'] == 'tool' else m['role'] }}|>{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call.function.name }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def base_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama of the other tests with heads of 32 numbers, which vLLM's attention on CPUs has a kernel for, and a
    chat template that knows tools."""
    folder = tmp_path_factory.mktemp("base-of-vllm")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder)
    tokenizer.chat_template = TEMPLATE
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


@dataclass
class Running:
    """vLLM, and our client around it."""

    llm: Any
    client: Any

    def close(self) -> None:
        self.llm.shutdown()

    async def answer(self, request: Request, **streams: Any) -> AsyncGenerator[Any]:
        """vLLM's outputs for a request: one, or a stream of them."""
        import vllm

        asked, name = request.sampling, uuid.uuid4().hex
        params = vllm.SamplingParams(
            **{each: getattr(asked, each) for each in SHARED},
            logit_bias=asked.biases or None,
            stop=list(asked.stop_texts),
            extra_args={REQUEST: name},
            **streams,
        )
        record = RequestRecord(request.coefficients, Spending())
        with self.client.recorded(name, record):
            outputs = self.llm.generate({"type": "token", "prompt_token_ids": [*request.prompt]}, params, name)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output


SHARED = [*SharedParams.model_fields.keys() - {"logit_bias", "stop"}, "logprobs"]


@pytest.fixture(scope="module")
def make_engine(
    runner: asyncio.Runner, base_folder: Path, vectors: dict[str, PreferenceVector]
) -> Iterator[MakeEngine]:
    """Starts engines, and ends those that the module's tests left."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    made = []

    async def start(config: EngineConfig, known: dict[str, PreferenceVector], folder: Path) -> Running:
        os.environ.update(environment(config, cpu=True))
        options = engine_options(folder, config)
        del options["enable_prompt_tokens_details"]  # of vLLM's server, not of its engine
        if config.mode == "steered":
            shape = SteeringShape.of(known.values(), config.columns)
            options["additional_config"] = {SECTION: {"shape": shape.model_dump(mode="json")}}
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **options))
        made.append(Running(llm, PreferenceClient(llm, folder, fingerprint(base_folder), config)))
        await made[-1].client.change(known)
        return made[-1]

    def make(
        mode: str, known: dict[str, PreferenceVector] | None = None, *, folder: Path = base_folder, **settings: Any
    ) -> Running:
        options = SMALL | settings.pop("vllm", {})
        config = EngineConfig(kind="vllm", mode=mode, vllm=options, **settings)  # type: ignore[arg-type]
        return runner.run(start(config, known or vectors, folder))

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module", params=["steered", "merged"])
def engine(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Any:
    """One engine in each mode: every test that takes this runs twice."""
    return make_engine(request.param)


@pytest.fixture(scope="module")
def run(runner: asyncio.Runner) -> Callable[[Running, list[Request]], list[Any]]:
    """All requests at once; vLLM's one output for each."""

    async def one(engine: Running, request: Request) -> Any:
        (output,) = [output async for output in engine.answer(request)]
        return output.outputs[0]

    async def everything(engine: Running, requests: list[Request]) -> list[Any]:
        return await asyncio.gather(*(one(engine, request) for request in requests))

    return lambda engine, requests: runner.run(everything(engine, requests))

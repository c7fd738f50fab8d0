"""A new lineup: beside the old one in a replica, and to all replicas of an endpoint or none."""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from prefvec_ray.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engine import EngineError
from prefvec_ray.serving.job import Job
from prefvec_ray.serving.lineup import Lineup, ServedVector, line_up
from prefvec_ray.serving.replica import Replica
from prefvec_ray.vectors import LiveModel, LowRank, load_vector, save_vector

DRAW = random.Random(9)
PROMPT = tuple(DRAW.randrange(5, 300) for _ in range(150))
SETTING = (("harmless", 0.5), ("helpful", 1.0))


@pytest.fixture(scope="module")
def next_helpful(vector_folders, tmp_path_factory) -> Path:
    """Another training of `helpful`."""
    old = load_vector(vector_folders["helpful"])
    draw = torch.Generator().manual_seed(9)
    entries = {
        name: LowRank(*(torch.randn(part.shape, generator=draw) * part.std() for part in entry.parts().values()))
        for name, entry in old.entries.items()
    }
    return save_vector(type(old)(old.info, entries), tmp_path_factory.mktemp("next") / "helpful")


@pytest.fixture
def registry(vector_folders, tmp_path) -> Registry:
    registry = Registry.open(tmp_path / "registry")
    for folder in vector_folders.values():
        registry.publish_vector(folder)
    return registry


def alone(base: Path, folders: Mapping[str, Path], prompt: Sequence[int], new: int) -> list[int]:
    live = LiveModel(LlamaForCausalLM.from_pretrained(base).eval(), {n: load_vector(f) for n, f in folders.items()})
    live.set_coefficients(dict(SETTING))
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        whole = live.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return whole[0, len(prompt) :].tolist()


@pytest.fixture(params=["merged", "steered"])
def config(request, base_folder, registry) -> ServingConfig:
    engine = {"mode": request.param, "max_new_tokens": 300, "max_batch": 8}
    return ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": str(registry.store.folder), "engine": engine}
    )


@pytest.fixture
def replica(config) -> Iterator[Replica]:
    replica = Replica(config, line_up(config))
    yield replica
    replica.engine.close()


def later(lineup: Lineup, generation: int) -> Lineup:
    return Lineup(lineup.base_fingerprint, lineup.vectors, lineup.policy, lineup.created, generation)


async def ask(replica: Replica, generation: int, new: int = 24) -> list[int]:
    job = Job((PROMPT,), SETTING, max_new_tokens=new, temperature=0.0, generation=generation)
    _, (answer,) = await replica.answer(job)
    return list(answer.tokens)


def test_a_request_keeps_the_lineup_that_it_started_with(
    config, replica, registry, base_folder, vector_folders, next_helpful
):
    """Same prompt, same coefficients, two generations, at once: nothing that one caches reaches the other."""
    registry.publish_vector(next_helpful)
    second = later(line_up(config), 1)
    assert second.vectors["helpful"].ref == "helpful@2"

    async def change_in_the_middle() -> list[list[int]]:
        job = Job((PROMPT,), SETTING, max_new_tokens=200, temperature=0.0)
        items = replica.stream(job)
        first: list[int] = []
        for _ in range(4):
            item: Any = await anext(items)
            first += [token for _, piece in item for token in piece.tokens] if isinstance(item, list) else []
        await replica.prepare(second, beside=0)
        told = await asyncio.gather(*(ask(replica, generation) for generation in (0, 1, 0, 1)))
        async for item in items:
            first += [token for _, piece in item for token in piece.tokens]
        return [*told, first]

    *told, first = asyncio.run(asyncio.wait_for(change_in_the_middle(), 120))
    old = alone(base_folder, vector_folders, PROMPT, 200)
    new = alone(base_folder, vector_folders | {"helpful": next_helpful}, PROMPT, 24)
    assert old[:24] != new
    assert first == old[: len(first)]
    for tokens, truth in zip(told, (old, new, old, new), strict=True):
        assert tokens == truth[: len(tokens)]


def test_what_cannot_be_prepared_leaves_everything_as_it_was(config, replica, registry, next_helpful):
    lineup = line_up(config)
    before = asyncio.run(ask(replica, 0))
    for vector, error in (
        (ServedVector("helpful@7", "blake3:" + "0" * 64, "low-rank", {}), "helpful@7"),
        (ServedVector("helpful@1", "blake3:" + "0" * 64, "low-rank", {}), "another vector"),
    ):
        bad = Lineup(lineup.base_fingerprint, {**lineup.vectors, "helpful": vector}, lineup.policy, 0, 1)
        with pytest.raises(InputError, match=error):
            asyncio.run(replica.prepare(bad, beside=0))
    replica.check_health()
    assert asyncio.run(ask(replica, 0)) == before
    with pytest.raises(EngineError, match="generation 1"):
        asyncio.run(ask(replica, 1))


def test_what_no_job_needs_is_dropped_and_comes_back_when_asked_for(config, replica):
    lineup = line_up(config)
    before = asyncio.run(ask(replica, 0))
    for generation in (1, 2, 3):
        asyncio.run(replica.prepare(later(lineup, generation), beside=generation - 1))
    assert asyncio.run(ask(replica, 0)) == asyncio.run(ask(replica, 3)) == before

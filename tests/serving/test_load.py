"""Many callers at once, every one at a setting of its own: each answer is a lone merged model's, whatever happens."""

import asyncio
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from prefvec_ray.serving import stop
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.cache import FIRST_TOKENS
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.serving.request import GenerationRequest

CLIENTS, NEW = 64, 12
SETTINGS = [{"harmless": i / 63, "helpful": 1 - i / 31.5} for i in range(CLIENTS)]
DRAW = random.Random(1)
SHARED = tuple(DRAW.randrange(5, 300) for _ in range(FIRST_TOKENS + 30))


def prompt(client: int) -> tuple[int, ...]:
    """Half of the clients share one, longer than a block of the cache; the others add to it."""
    return SHARED + tuple(range(5, 5 + client // 2)) * (client % 2)


@pytest.fixture(scope="module")
def alone(merged_alone: Callable[..., list[int]]) -> list[list[int]]:
    return [merged_alone(prompt(client), SETTINGS[client], NEW) for client in range(CLIENTS)]


def job(client: int, preferences: Mapping[str, float], max_tokens: int) -> GenerationRequest:
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return GenerationRequest((prompt(client),), tuple(sorted(preferences.items())), greedy)


@pytest.mark.parametrize("mode", ["merged", "steered"])
def test_64_clients_at_64_settings(mode, make_replica, base_folder, registry_root, alone):
    """With fewer rows than clients, and with callers who hang up in the middle of their answers."""
    engine = {"mode": mode, "max_batch": 24, "max_new_tokens": 200}
    config = ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": registry_root, "engine": engine}
    )
    replica = make_replica(config, resolve_release(config))

    async def ask(client: int) -> list[int]:
        _, (answer,) = await replica.answer(job(client, SETTINGS[client], max_tokens=NEW))
        return list(answer.tokens)

    async def hang_up(client: int) -> None:
        items = replica.stream(job(client, SETTINGS[client], max_tokens=200))
        for _ in range(2 + client // 8 % 3):
            await anext(items)
        await items.aclose()

    async def all_at_once() -> list[list[int]]:
        leaving = asyncio.gather(*(hang_up(client) for client in range(0, CLIENTS, 8)))
        told = await asyncio.gather(*(ask(client) for client in range(CLIENTS)))
        await leaving
        return told

    try:
        told = asyncio.run(asyncio.wait_for(all_at_once(), 240))
    finally:
        replica.engine.close()
    assert told == alone
    assert len({tuple(tokens) for tokens in told}) > CLIENTS // 2, "the settings must make a difference"
    assert replica.status().finished >= CLIENTS
    assert replica.status().cancelled > 0


def test_traffic_at_capacity_while_replicas_die_a_preset_moves_and_new_vectors_come(ray_cluster, running, monkeypatch):
    """What `make load-serve` does for ten minutes, for a few seconds."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from load_serve import load

    stop()  # another file's endpoint; it deploys its own again
    found = load(ray_cluster, seconds=12, kill_every=4, fewest=2)
    assert found["answered"] > 50
    assert found["kills"] >= 2
    assert (found["preset_moves"], found["generation"]) == (2, 1)
    assert (found["wrong"], found["failed_after_retries"], found["streams_cut_by_kills"]) == (0, 0, 0), found["errors"]
    assert found["ties"] < found["answered"] / 10

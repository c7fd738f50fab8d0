"""Two replicas of vLLM behind two fronts: a conversation stays with the replica that has its beginning in the cache."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from prefvec_ray.serving import ServingConfig, start, stop
from tests.conftest import free_port

CONVERSATIONS, TURNS = 12, 3
BLOCK = 128


@pytest.fixture(scope="module")
def url(ray_cluster: str, guarded: dict[str, Any]) -> Iterator[str]:
    config = ServingConfig.model_validate(
        {
            **guarded,
            "engine": {"kind": "vllm", "mode": "steered", "vllm": {"kv_cache_memory_bytes": 2**26}},
            "replicas": {"min": 2, "max": 2},
            "ingress_replicas": 2,
        }
    )
    yield start(config, port=free_port())
    stop()


def test_a_conversation_finds_its_beginning_in_the_cache(url):
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        for turn in range(TURNS):
            for number in range(CONVERSATIONS):
                opening = f"{number} quick brown foxes jump over the lazy dog while wizards cook. " * 6
                messages: list[Any] = [{"role": "system", "content": opening}]
                messages += [{"role": "user", "content": f"why {turn}?"}]
                answer = client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=2, extra_body={"preferences": {"helpful": number / 16}}
                )
                assert answer.usage is not None
                assert answer.usage.prompt_tokens > BLOCK
                details = answer.usage.prompt_tokens_details
                read = (details and details.cached_tokens) or 0
                assert (read >= BLOCK) == (turn > 0), (turn, number)
    finished = [each["finished"] for each in httpx.get(url.removesuffix("/v1") + "/healthz").json()["replicas"]]
    assert sum(finished) >= CONVERSATIONS * TURNS
    assert min(finished) > TURNS, "they spread over both"

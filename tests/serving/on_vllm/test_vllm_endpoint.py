"""The endpoint with vLLM behind it: the unmodified OpenAI client, a setting for each caller, vectors that move."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from prefvec_ray.serving import ServingConfig, start, stop

PROMPT = "the quick brown fox jumps over the lazy dog while seven wizards cook " * 5


@pytest.fixture(scope="module", params=["steered", "merged"])
def client(request, ray_cluster, base_folder, registry_root) -> Iterator[OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = {"kind": "vllm", "mode": request.param, "max_new_tokens": 200, "vllm": {"kv_cache_memory_bytes": 2**26}}
    config = ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": registry_root, "engine": engine}
    )
    with OpenAI(base_url=start(config, port=port), api_key="none", max_retries=0, timeout=120) as client:
        yield client
    stop()


def test_every_caller_has_its_own_setting(client, tokenizer, merged_alone):
    prompt = tokenizer(PROMPT)["input_ids"]
    assert len(prompt) > 128, "longer than a block of the cache"
    settings = [{"helpful": 1 - i / 8, "harmless": i / 16} for i in range(16)]

    def call(setting: dict[str, float]) -> Any:
        return client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"preferences": setting}
        )

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(call, settings))
    for setting, answer in zip(settings, answers, strict=True):
        expected = merged_alone(prompt, setting, 24)
        assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.model_extra["preferences"] == setting
    assert len({answer.choices[0].text for answer in answers}) > 8


def test_a_stream_and_a_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny@cautious",
            messages=[{"role": "user", "content": "why not?"}],
            max_tokens=20,
            temperature=0,
            stream=True,
        )
    )
    whole = client.chat.completions.create(
        model="tiny@cautious", messages=[{"role": "user", "content": "why not?"}], max_tokens=20, temperature=0
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 20


def test_refusals_and_health(client):
    with pytest.raises(BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="fox " * 600, max_tokens=20)
    health = httpx.get(str(client.base_url).removesuffix("/v1/") + "/healthz", timeout=30).json()
    assert health["replicas"][0]["running"] == 0

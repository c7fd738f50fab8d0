"""OpenAI's own client, unmodified, and curl; every object that comes back is one of OpenAI's, strictly."""

import asyncio
import json
import shutil
import subprocess
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, OpenAI, PermissionDeniedError, RateLimitError
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject

from tests.serving.api_cases import check_table

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": 12,
    "temperature": 0,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "stop": ["at 12"],
    "preferences": {"helpful": 0.5},
}
TEXT: dict[str, Any] = {
    "model": "tiny@cautious@1",
    "prompt": ["the lazy dog", "why"],
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": 2,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PATHS: dict[str, tuple[dict[str, Any], type[Any]]] = {
    "/chat/completions": (CHAT, ChatCompletion),
    "/completions": (TEXT, Completion),
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """What a stream sends, without its end."""
    *lines, end = [line for line in response.text.split("\n\n") if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("path", PATHS)
def test_whole_answers_and_streams_are_openais_and_tell_the_same(endpoint, path):
    ask, kind = PATHS[path]
    response = endpoint.post(ask, path)
    whole: Any = kind.model_validate(response.json(), strict=True)
    assert response.headers["x-request-id"]
    chunks: list[Any] = []
    for event in events(endpoint.post(ask | STREAM, path)):
        if kind is Completion:
            for choice in event["choices"]:  # null until the last, as OpenAI sends it; its type does not say so
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        chunks.append((ChatCompletionChunk if kind is ChatCompletion else kind).model_validate(event, strict=True))
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        told = [part.logprobs for part in parts if part.logprobs is not None]
        if kind is ChatCompletion:
            assert "".join(part.delta.content or "" for part in parts) == choice.message.content
            entries = choice.logprobs.content
            text = b"".join(bytes(entry.bytes) for entry in entries)
            assert text.decode(errors="replace") == choice.message.content
            assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries), "greedy"
            streamed = [entry for each in told for entry in each.content]
            assert [entry.token for entry in streamed] == [entry.token for entry in entries]
            assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-4)
        else:
            assert "".join(part.text for part in parts) == choice.text
            whole_told = choice.logprobs
            assert whole_told.text_offset == sorted(whole_told.text_offset)
            for offset, token in zip(whole_told.text_offset, whole_told.tokens, strict=True):
                assert "\ufffd" in token or choice.text[offset:].startswith(token)
            assert [max(top.values()) for top in whole_told.top_logprobs] == whole_told.token_logprobs
            assert [offset for each in told for offset in each.text_offset] == whole_told.text_offset


def test_the_sync_and_async_clients(endpoint):
    ask = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 8, "temperature": 0}
    secret = endpoint.key("a client")

    async def both() -> tuple[ChatCompletion, str]:
        async with AsyncOpenAI(base_url=endpoint.url, api_key=secret) as client:
            answer = await client.chat.completions.create(**ask)
            stream = await client.chat.completions.create(**ask, stream=True)
            return answer, "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    answer, streamed = asyncio.run(both())
    with OpenAI(base_url=endpoint.url, api_key=secret) as client:
        same = client.chat.completions.create(**ask)
        for model in client.models.list():
            Model.model_validate(model.model_dump(), strict=True)
    assert answer.choices[0].message.content == same.choices[0].message.content == streamed
    assert answer._request_id
    assert answer._request_id in {line["request"] for line in endpoint.audited()}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(endpoint):
    body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 4, "stream": True})
    command = ["curl", "-sSN", f"{endpoint.url}/completions", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("data: {")
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_refusals_are_the_clients_own_exceptions(endpoint):
    ask = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 4}

    def client(key: str, **settings: Any) -> OpenAI:
        return OpenAI(base_url=endpoint.url, api_key=key, **{"max_retries": 0} | settings)

    with pytest.raises(AuthenticationError, match="not known here") as caught:
        client("pv-guess").chat.completions.create(**ask)
    ErrorObject.model_validate(caught.value.body, strict=True)
    presets = client(endpoint.key("presets", coefficients="presets"))
    with pytest.raises(PermissionDeniedError, match="only presets"):
        presets.chat.completions.create(**ask, extra_body={"preferences": {"helpful": 0.1}})
    with pytest.raises(BadRequestError, match="outside the allowed range"):
        client("none").chat.completions.create(**ask, extra_body={"preferences": {"harmless": -0.1}})
    limited = client(endpoint.key("limited", requests_per_minute=2, tokens_per_minute=1000))
    raw = limited.chat.completions.with_raw_response.create(**ask)
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    limited.chat.completions.create(**ask)
    with pytest.raises(RateLimitError, match="2 requests per minute") as refused:
        limited.chat.completions.create(**ask)
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
    thrifty = client(endpoint.key("thrifty", tokens_per_day=50))
    thrifty.chat.completions.create(**ask)
    with pytest.raises(RateLimitError, match="50 tokens per day"):
        thrifty.chat.completions.create(**ask | {"max_tokens": 40})
    codes = [line["code"] for line in endpoint.audited() if line["decision"] == "refused"]
    wanted = [
        "invalid_api_key",
        "presets_only",
        "preference_out_of_range",
        "rate_limit_exceeded",
        "rate_limit_exceeded",
    ]
    assert codes[-5:] == wanted


def test_a_caller_sees_what_it_may_ask_for(endpoint):
    secret = endpoint.key("team", ranges={"harmless": {"min": 0.5, "default": 0.6}}, coefficients="presets", presets=())

    def card(key: str) -> dict[str, Any]:
        return httpx.get(endpoint.url + "/preferences", headers={"authorization": f"Bearer {key}"}).json()

    mine, everybodys = card(secret), card("none")
    assert [(p["min"], p["default"]) for p in mine["preferences"] if p["preference"] == "harmless"] == [(0.5, 0.6)]
    assert [(p["min"], p["default"]) for p in everybodys["preferences"] if p["preference"] == "harmless"] == [(0, 0)]
    assert (mine["coefficients"], everybodys["coefficients"]) == ("presets", "free")
    assert (mine["presets"], [p["model"] for p in everybodys["presets"]]) == ([], ["tiny@cautious"])
    assert card("pv-guess")["error"]["code"] == "invalid_api_key"


def test_the_table_of_the_documentation_is_true(endpoint):
    check_table(endpoint.url, 1)

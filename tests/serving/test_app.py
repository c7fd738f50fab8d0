"""The endpoint over real HTTP: OpenAI's own client, a real Ray cluster, a real (tiny, random) model."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import PreTrainedTokenizerFast

CHAT: Any = [{"role": "user", "content": "the quick brown fox"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def said(tokenizer: PreTrainedTokenizerFast, merged_alone: Callable[..., list[int]]) -> Callable[..., str]:
    """The text that a model merged for these coefficients alone answers to CHAT."""
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]

    def text(**preferences: float) -> str:
        return tokenizer.decode(merged_alone(prompt, preferences, 24), skip_special_tokens=True)

    return text


def test_an_answer_at_the_callers_preferences_says_what_it_used(endpoint, said):
    raw = endpoint.client.chat.completions.with_raw_response.create(**ASK, extra_body={"preferences": {"helpful": 0.5}})
    answer = raw.parse()
    assert answer.choices[0].message.content == said(helpful=0.5) != said()
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.preferences == {"helpful": 0.5, "harmless": 0.0}
    assert json.loads(raw.headers["x-prefvec-preferences"]) == answer.preferences
    assert raw.headers["x-prefvec-fingerprint"] == answer.system_fingerprint
    same = endpoint.client.chat.completions.create(**ASK, extra_body={"preferences": {"helpful": 0.5}})
    base = endpoint.client.chat.completions.create(**ASK)
    assert same.system_fingerprint == answer.system_fingerprint != base.system_fingerprint
    assert base.choices[0].message.content == said()


def test_many_callers_at_once_each_get_their_own_balance(endpoint, said):
    settings = [{"helpful": i / 8 - 1, "harmless": i / 16} for i in range(16)]

    async def all_at_once() -> list[ChatCompletion]:
        async with AsyncOpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:
            asking = (client.chat.completions.create(**ASK, extra_body={"preferences": each}) for each in settings)
            return await asyncio.gather(*asking)

    answers = asyncio.run(all_at_once())
    assert [answer.choices[0].message.content for answer in answers] == [said(**each) for each in settings]
    assert len({answer.system_fingerprint for answer in answers}) == 16


def test_a_stream_joins_to_the_whole_answer(endpoint, said):
    chunks = list(
        endpoint.client.chat.completions.create(
            **ASK,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"preferences": {"helpful": 0.5}},
        )
    )
    *spoken, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == said(helpful=0.5)
    assert spoken[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in spoken[:-1]] == [None] * (len(spoken) - 1)
    assert spoken[-1].choices[0].finish_reason in ("stop", "length")
    assert usage.choices == []
    assert usage.usage.completion_tokens <= 24
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.preferences == {"helpful": 0.5, "harmless": 0.0} for chunk in chunks)


def test_choices_seeds_and_stop(endpoint):
    sampled = ASK | {"temperature": 1.0, "seed": 11, "n": 3}
    first = endpoint.client.chat.completions.create(**sampled)
    again = endpoint.client.chat.completions.create(**sampled)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    stop = texts[0][4:6]
    stopped = endpoint.client.chat.completions.create(**sampled | {"n": 1}, stop=[stop])
    assert stopped.choices[0].message.content == texts[0][: texts[0].index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed: dict[int, str] = {}
    for chunk in endpoint.client.chat.completions.create(**sampled, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts


def test_text_completions_take_text_lists_and_tokens(endpoint, tokenizer, merged_alone):
    def complete(prompt: Any, **settings: Any) -> Any:
        return endpoint.client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=10,
            temperature=0,
            extra_body={"preferences": {"harmless": 1.0}},
            **settings,
        )

    ids = tokenizer("the lazy dog").input_ids
    alone = tokenizer.decode(merged_alone(ids, {"harmless": 1.0}, 10), skip_special_tokens=True)
    assert complete("the lazy dog").choices[0].text == alone
    assert [c.text for c in complete(["the lazy dog", "at 12:30"], n=2).choices][:2] == [alone] * 2
    assert [c.text for c in complete([ids, ids]).choices] == [alone] * 2
    assert "".join(c.choices[0].text for c in complete(ids, stream=True)) == alone


def test_a_preset_is_a_model_name_and_takes_up_its_newest_version(endpoint, said):
    def ask() -> Any:
        return endpoint.client.chat.completions.create(**ASK | {"model": "tiny@cautious"})

    first = ask()
    assert first.preferences == {"helpful": 0.25, "harmless": 0.75}
    assert first.choices[0].message.content == said(helpful=0.25, harmless=0.75)
    assert first.model == "tiny@cautious"
    endpoint.registry.publish_preset("cautious", {"helpful@1": 0.5, "harmless@1": 0.5}, reason="moved")
    assert ask().preferences == {"helpful": 0.5, "harmless": 0.5}
    pinned = endpoint.client.chat.completions.create(**ASK | {"model": "tiny@cautious@1"})
    assert pinned.system_fingerprint == first.system_fingerprint


def test_models_preferences_and_health(endpoint):
    names = [model.id for model in endpoint.client.models.list()]
    assert names == ["tiny", "tiny@cautious"], "a preset below the operator's floor is not offered"
    assert endpoint.client.models.retrieve("tiny@cautious").id == "tiny@cautious"
    card = httpx.get(endpoint.url + "/preferences").json()
    bounds = {p["preference"]: (p["vector"], p["min"], p["max"], p["default"]) for p in card["preferences"]}
    assert bounds == {"helpful": ("helpful@1", -1, 1, 0), "harmless": ("harmless@1", 0, 1, 0)}
    (preset,) = card["presets"]
    assert preset["model"] == "tiny@cautious"
    answer = endpoint.client.chat.completions.create(**ASK | {"model": "tiny@cautious"})
    assert (preset["preferences"], preset["fingerprint"]) == (answer.preferences, answer.system_fingerprint)
    assert endpoint.status()["failed"] == 0


def test_answers_fit_openais_own_types_strictly(endpoint):
    body = ASK | {"preferences": {"helpful": 1}}
    ChatCompletion.model_validate(endpoint.post(body).json(), strict=True)
    text = {"model": "tiny", "prompt": "the", "max_tokens": 3}
    Completion.model_validate(endpoint.post(text, "/completions").json(), strict=True)


BAD: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"preferences": {"helpfull": 1.0}}, 400, "unknown_preference", "preferences.helpfull"),
    ({"preferences": {"harmless": -0.1}}, 400, "preference_out_of_range", "preferences.harmless"),
    ({"preferences": {"helpful": float("nan")}}, 400, None, "preferences"),
    ({"preferences": {"helpful": float("inf")}}, 400, None, "preferences"),
    ({"preferences": {"helpful": "1"}}, 400, None, "preferences"),
    ({"preferences": {"helpful": True}}, 400, None, "preferences"),
    ({"preferences": [1, 2]}, 400, None, "preferences"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"model": "tiny@nobody"}, 404, "model_not_found", "model"),
    ({"model": "tiny@"}, 404, "model_not_found", "model"),
    ({"model": "tiny@../../x"}, 404, "model_not_found", "model"),
    ({"model": "tiny@reckless"}, 400, "preference_out_of_range", "preferences.harmless"),
    ({"model": "tiny@cautious", "preferences": {}}, 400, "preset_and_preferences", "preferences"),
    ({"temperature": -1}, 400, None, "temperature"),
    ({"n": 21}, 400, None, "n"),
    ({"max_tokens": 401}, 400, None, "max_tokens"),
    ({"stop": ["", "x"]}, 400, None, "stop"),
    ({"stop": ["a"] * 5}, 400, None, "stop"),
    ({"messages": []}, 400, None, "messages"),
    ({"messages": [{"role": "user", "content": "fox " * 800}]}, 400, "context_length_exceeded", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, None, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None, "messages"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None, None),
    ({"top_logprobs": 2}, 400, None, None),
    ({"logprobs": True, "top_logprobs": 21}, 400, None, "top_logprobs"),
    ({"frequency_penalty": 2.5}, 400, None, "frequency_penalty"),
    ({"logit_bias": {"99999": 1.0}}, 400, None, None),
    ({"typo": 1}, 400, None, "typo"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_is_said_in_openais_form(endpoint, stream):
    for changes, status, code, param in BAD:
        response = endpoint.post(ASK | changes | {"stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), changes
        assert error["type"] == "invalid_request_error"
        assert "Traceback" not in error["message"]


def test_settings_that_ask_for_nothing_are_no_mistake(endpoint):
    nothing = {"frequency_penalty": 0, "tools": [], "logprobs": None, "user": "me", "metadata": {"a": "b"}}
    response = endpoint.post(ASK | nothing | {"response_format": {"type": "text"}, "preferences": None})
    assert response.status_code == 200


def test_the_client_raises_its_own_errors(endpoint):
    with pytest.raises(BadRequestError, match="served here: harmless, helpful"):
        endpoint.client.chat.completions.create(**ASK, extra_body={"preferences": {"polite": 1}})
    with pytest.raises(NotFoundError, match="served: tiny"):
        endpoint.client.chat.completions.create(**ASK | {"model": "huge"})


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b'{"model": "\\ud800"}', {}, 400),
        (b"[" * 20_000, {}, 400),
        (b'{"model":"' + b"x" * 60_000 + b'"}', {}, 413),
        (json.dumps(ASK).encode(), {"content-type": "text/plain"}, 415),
    ],
)
def test_bodies_that_are_no_requests(endpoint, content, headers, status):
    response = endpoint.post(content, **headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_unknown_routes_and_methods_have_openais_form_too(endpoint):
    assert httpx.get(endpoint.url + "/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(endpoint.url + "/chat/completions").status_code == 405
    document = httpx.get(endpoint.url.removesuffix("/v1") + "/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    kinds = body["content"]["application/json"]["schema"]["anyOf"]  # of the slot engine, and of vLLM
    assert kinds == [{"$ref": f"#/components/schemas/{name}"} for name in ("ChatBody", "VllmChatBody")]
    for name in ("ChatBody", "VllmChatBody"):
        assert "preferences" in document["components"]["schemas"][name]["properties"]


def wait_until_idle(endpoint: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (status := endpoint.status())["running"] + status["waiting"]:
        assert time.monotonic() < deadline, f"still busy: {status}"
        time.sleep(0.05)
    return status


def test_beyond_its_queue_the_server_says_at_once_that_it_is_busy(endpoint):
    long = ASK | {"n": 20, "temperature": 2.0, "max_tokens": 400}

    async def crowd() -> list[httpx.Response | BaseException]:
        limits = httpx.Limits(max_connections=101)
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=4, limits=limits) as client:
            asking = [asyncio.create_task(client.post("/chat/completions", json=long)) for _ in range(100)]
            await asyncio.sleep(1)
            health = await client.get(endpoint.url.removesuffix("/v1") + "/healthz")
            assert health.json()["replicas"][0]["running"], "busy is not unhealthy"
            return await asyncio.gather(*asking, return_exceptions=True)

    told = [response for response in asyncio.run(crowd()) if isinstance(response, httpx.Response)]
    assert len(told) > 20, "16 at work and 32 waiting: most of a hundred must be turned away"
    assert {response.status_code for response in told} <= {200, 503}
    refused = next(response for response in told if response.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"]
    wait_until_idle(endpoint)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_stops_its_generation(endpoint, stream):
    before = wait_until_idle(endpoint)
    long = ASK | {"n": 20, "temperature": 2.0, "max_tokens": 400, "stream": stream}
    with httpx.Client(base_url=endpoint.url) as client:
        if stream:
            with client.stream("POST", "/chat/completions", json=long) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/chat/completions", json=long, timeout=0.3)
    after = wait_until_idle(endpoint)
    assert after["cancelled"] > before["cancelled"]


def test_the_front_has_no_torch(endpoint):
    """It would take it seconds to start, and hundreds of megabytes that no request needs."""
    endpoint.client.chat.completions.create(**ASK)
    ours = psutil.Process().children(recursive=True)
    replicas = [each for each in ours if "ServeReplica" in " ".join(each.cmdline())]
    with_torch = {
        each.cmdline()[0].split(":")[-1].partition(".")[0].partition("-")[0]: any(
            "libtorch" in part.path for part in each.memory_maps()
        )
        for each in replicas
    }
    assert with_torch == {"front": False, "replica": True}

"""One declaration for each sampling parameter: bodies take it, and it reaches the engine as it was given."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.base import Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams, SharedParams
from prefvec_ray.serving.http.openai_protocol import ChatBody, ResponseFormat, TextBody
from prefvec_ray.serving.http.parsing import parse_body
from prefvec_ray.serving.release.release import resolve_release

GIVEN: dict[str, Any] = {
    "n": 2,
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 40,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"7": 1.5},
    "seed": 5,
    "stop": ["never", "ever"],
    "logprobs": 3,
    "json_schema": ResponseFormat(type="json_object").schema_text,
}
"""a value for every parameter; none is the default"""
BODIES = {
    ChatBody: {
        "messages": [{"role": "user", "content": "the dog"}],
        "logprobs": True,
        "top_logprobs": 3,
        "response_format": {"type": "json_object"},
    },
    TextBody: {"prompt": "the dog", "logprobs": 3},
}
SETTING = (("harmless", 0.5), ("helpful", -0.5))


def body(kind: Any, **fields: Any) -> Any:
    return parse_body(json.dumps({"model": "tiny"} | BODIES[kind] | fields).encode(), kind)


def test_a_value_is_given_here_for_every_parameter():
    assert GIVEN.keys() == SamplingParams.model_fields.keys()
    assert all(GIVEN[name] != getattr(SamplingParams(), name) for name in GIVEN)


@pytest.mark.parametrize("kind", BODIES)
def test_every_parameter_of_a_body_reaches_the_engine_as_it_was_given(
    kind, make_replica, base_folder, registry_root, monkeypatch
):
    config = ServingConfig(model="tiny", base=base_folder, registry=registry_root)
    replica = make_replica(config, resolve_release(config))
    received: list[Request] = []
    submit = replica.engine.submit

    def recorded(request: Request, emit: Callable[..., None]) -> Any:
        received.append(request)
        return submit(request, emit)

    monkeypatch.setattr(replica.engine, "submit", recorded)
    try:
        asked = body(kind, **{name: value for name, value in GIVEN.items() if name in SharedParams.model_fields})
        asyncio.run(replica.answer(asked.replica_request(SETTING)))
    finally:
        replica.engine.close()
    expected = GIVEN | ({} if kind is ChatBody else {"json_schema": None})  # text completions have no such field
    assert [request.sampling for request in received] == [SamplingParams(**expected)] * 2
    assert [request.random_key() for request in received] == ["5/0", "5/1"]


@pytest.mark.parametrize("kind", BODIES)
def test_what_is_null_or_left_out_is_the_default(kind):
    silent = body(kind, **dict.fromkeys([*SharedParams.model_fields, *BODIES[kind].keys() - {"messages", "prompt"}]))
    assert silent.replica_request(SETTING).sampling == SamplingParams()


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", -1, "temperature: Input should be greater than or equal to 0"),
        ("temperature", 2.5, "temperature: Input should be less than or equal to 2"),
        ("temperature", "1", "temperature: Input should be a valid number"),
        ("top_p", 0, "top_p: Input should be greater than 0"),
        ("n", 129, "n: Input should be less than or equal to 128"),
        ("n", True, "n: Input should be a valid integer"),
        ("max_tokens", 0, "max_tokens: Input should be greater than or equal to 1"),
        ("seed", 2**63, "seed: Input should be less than 9223372036854775808"),
        ("stop", "", "stop.constrained-str: String should have at least 1 character"),
        ("stop", ["a"] * 5, "stop.constrained-str: Input should be a valid string"),
        ("top_k", -2, "top_k: Input should be greater than or equal to -1"),
        ("min_p", 1.5, "min_p: Input should be less than or equal to 1"),
        ("presence_penalty", 2.1, "presence_penalty: Input should be less than or equal to 2"),
        ("repetition_penalty", 0, "repetition_penalty: Input should be greater than 0"),
        ("logit_bias", {"1": 101}, "logit_bias.1: Input should be less than or equal to 100"),
        ("logit_bias", {"one": 1}, "logit_bias.one.[key]: String should match pattern '^[0-9]{1,9}$'"),
    ],
)
def test_what_is_out_of_range_is_named(kind, name, value, says):
    with pytest.raises(ApiError) as caught:
        body(kind, **{name: value})
    assert caught.value.error.message == says


def test_a_seed_decides_the_random_numbers_and_none_means_new_ones():
    seeded, free = (Request((1,), (), SamplingParams(seed=seed, max_tokens=1)) for seed in (7, None))
    assert seeded.random_key() == seeded.random_key() == "7/0"
    assert free.random_key() != free.random_key()


def test_an_engine_needs_a_number_of_tokens():
    with pytest.raises(InputError, match="max_tokens is not set"):
        _ = Request((1,), (), SamplingParams()).max_tokens

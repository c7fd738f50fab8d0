"""Answers that are JSON of a schema: from a model of random weights, at any temperature and any coefficients."""

import json
import threading
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jsonschema
import pytest
import torch
from openai import BadRequestError
from pydantic import BaseModel, Field
from transformers import LlamaForCausalLM

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.grammar import KEPT, TOO_COMPLEX, Grammars, masked
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import SteeredWeights
from prefvec_ray.serving.http.openai_protocol import ResponseFormat
from prefvec_ray.vectors import Steering


class Answer(BaseModel):
    kind: Literal["fox", "dog"]
    legs: int = Field(ge=0, le=99)
    tags: list[bool] = Field(max_length=3)
    name: str = Field(max_length=12, pattern="^[a-z ]*$")


SCHEMA = {**Answer.model_json_schema(), "additionalProperties": False}
WANTED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def schema_text(schema: dict[str, Any]) -> str:
    text = ResponseFormat.model_validate(
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ).schema_text
    assert text is not None
    return text


@pytest.fixture(scope="module")
def engine(base_folder, tokenizer, vectors):
    with Steering(LlamaForCausalLM.from_pretrained(base_folder), vectors) as steering:
        engine = SlotEngine(SteeredWeights(steering), tokenizer).start()
        yield engine
        engine.close()


def generate(engine: SlotEngine, requests: list[Request]) -> list[list[OutputDelta]]:
    answers: list[list[OutputDelta]] = [[] for _ in requests]
    errors: list[Exception] = []
    done = threading.Semaphore(0)

    def emit(index: int, output: OutputDelta | Exception) -> None:
        if isinstance(output, Exception):
            errors.append(output)
            done.release()
            return
        answers[index].append(output)
        if output.finish_reason:
            done.release()

    for index, request in enumerate(requests):
        engine.submit(request, partial(emit, index))
    for _ in requests:
        assert done.acquire(timeout=120)
    for error in errors:
        assert not any(answers), "an error comes in place of an answer"
        raise error
    return answers


def ask(schema: dict[str, Any] | None, seed: int, **more: Any) -> Request:
    params = {"max_tokens": 200, "temperature": 1.5, "seed": seed} | more
    wanted = None if schema is None else schema_text(schema)
    etas = (("harmless", seed / 10), ("helpful", -seed / 5))
    return Request((7, 8, 9 + seed), etas, SamplingParams(json_schema=wanted, **params))


def test_every_answer_is_of_its_schema_beside_free_ones(engine):
    requests = [ask(SCHEMA if seed % 2 else None, seed, temperature=seed % 3) for seed in range(12)]
    free = generate(engine, [request for request in requests if request.sampling.json_schema is None])
    together = generate(engine, requests)
    texts = ["".join(delta.text for delta in deltas) for deltas in together]
    for text, deltas, request in zip(texts, together, requests, strict=True):
        if request.sampling.json_schema:
            assert deltas[-1].finish_reason == "stop"
            Answer.model_validate_json(text)
            assert json.dumps(json.loads(text), ensure_ascii=False) == text, "no white space but json.dumps's"
    assert len(set(texts[1::2])) > 3
    assert texts[::2] == ["".join(delta.text for delta in deltas) for deltas in free], "the others are as without"


def test_bias_and_cuts_choose_among_what_the_schema_allows(engine):
    either = {"enum": ["fox", "dog"]}
    (token,) = engine._tokenizer.encode("d", add_special_tokens=False)
    for bias, expected in ((100.0, '"dog"'), (-100.0, '"fox"')):
        (deltas,) = generate(engine, [ask(either, 1, temperature=0, logit_bias={str(token): bias})])
        assert "".join(delta.text for delta in deltas) == expected
    (deltas,) = generate(engine, [ask(either, 1, top_k=1, min_p=1.0, presence_penalty=2.0)])
    assert "".join(delta.text for delta in deltas) in ('"dog"', '"fox"')


def test_an_answer_that_was_received_in_part_goes_on_within_its_schema(engine):
    whole = ask(SCHEMA, 3)
    (deltas,) = generate(engine, [whole])
    tokens = [token for delta in deltas for token in delta.tokens]
    (again,) = generate(engine, [replace(whole, resume_tokens=tuple(tokens[: len(tokens) // 2]))])
    text = "".join(delta.text for delta in again)
    Answer.model_validate_json(text)
    # Tokens that no answer of the schema begins with: an error, not an answer that looks like one.
    with pytest.raises(InputError) as caught:
        generate(engine, [replace(whole, resume_tokens=(300, 300))])
    assert str(caught.value) == TOO_COMPLEX


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"$ref": "http://127.0.0.1:1/x"}, "does not fetch resources"),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "Unimplemented keys"),
        ({"type": "object", "required": "a"}, "not usable"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused(engine, schema, says):
    with pytest.raises(InputError, match="response_format: the schema is not usable") as caught:
        engine.check(ask(schema, 1))
    assert says in str(caught.value)


def test_a_callers_schema_does_not_set_the_rules(engine):
    """`x-guidance` would let it leave out what is not understood."""
    lenient = {"if": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(InputError, match="Unimplemented keys"):
        engine.check(ask(lenient, 1))


def test_compiled_schemas_are_bounded(tokenizer):
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for number in range(KEPT + 5):
        grammars.matcher(schema_text({"const": number}))
    assert len(grammars._matchers) == KEPT
    one, other = (grammars.matcher(schema_text({"const": KEPT})) for _ in range(2))
    logits = torch.zeros(3, len(tokenizer))
    first = masked(logits, [one, other, None])
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], logits[2])
    assert one.consume_token(int(first[0].argmax()))
    assert torch.equal(masked(logits, [None, other, None])[1], first[1]), "each answer has a matcher of its own"


CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "why not?"}], "max_tokens": 200}


def test_openais_client_parses_answers(endpoint):
    etas = {"preferences": {"helpful": 0.7, "harmless": 0.2}}
    for temperature in (0.0, 1.0):
        parsed = endpoint.client.chat.completions.parse(
            **CHAT, response_format=Answer, temperature=temperature, seed=1, extra_body=etas
        )
        assert isinstance(parsed.choices[0].message.parsed, Answer)
    chunks = endpoint.client.chat.completions.create(**CHAT, response_format=WANTED, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"type": "json_schema"}, "goes with type 'json_schema'"),
        ({"type": "json_object", "json_schema": {"name": "x"}}, "goes with type 'json_schema'"),
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}, "Invalid type"),
    ],
    ids=str,
)
def test_a_bad_format_is_a_400(endpoint, wanted, says):
    with pytest.raises(BadRequestError, match=says):
        endpoint.client.chat.completions.create(**CHAT, response_format=wanted)


def test_any_object_will_do(endpoint):
    short = CHAT | {"max_tokens": 3, "temperature": 0}
    answer = endpoint.client.chat.completions.create(**short, response_format={"type": "json_object"})
    assert answer.choices[0].message.content.startswith("{")

"""Request bodies: what is wrong is named in a few words, and finding it costs no more than the body's size."""

import json
import tracemalloc

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.http.openai_protocol import ChatBody, TextBody
from prefvec_ray.serving.http.parsing import MostIds, parse_body

MESSAGE = {"role": "user", "content": "x"}


def many(head: str, item: str, tail: str, size: int = 1_000_000) -> bytes:
    """A body of `size` bytes that is one item again and again."""
    return (head + ",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail).encode()


TEXT = '{"model":"tiny","prompt":['
CHAT = '{"model":"tiny","messages":[{"role":"user","content":['
STORMS: dict[str, tuple[type[BaseModel], bytes]] = {
    "objects": (TextBody, many(TEXT, "{}", "]}")),
    "nulls": (TextBody, many(TEXT, "null", "]}")),
    "floats": (TextBody, many(TEXT, "1.5", "]}")),
    "booleans": (TextBody, many(TEXT, "true", "]}")),
    "negative ids": (TextBody, many(TEXT, "-1", "]}")),
    "ids and one text": (TextBody, many(TEXT, "1", ',"a"]}')),
    "empty texts": (TextBody, many(TEXT, '""', "]}")),
    "lists of objects": (TextBody, many(TEXT, "[{}]", "]}")),
    "one list of objects": (TextBody, many(TEXT + "[", "{}", "]]}")),
    "lists of empty lists": (TextBody, many(TEXT, "[[]]", "]}")),
    "nine hundred lists": (TextBody, many(TEXT, "[" + ",".join(["{}"] * 300) + "]", "]}")),
    "parts": (ChatBody, many(CHAT, '{"type":"text","text":""}', "]}]}")),
    "wrong parts": (ChatBody, many(CHAT, "{}", "]}]}")),
    "numbers as parts": (ChatBody, many(CHAT, "1", "]}]}")),
    "messages": (ChatBody, many('{"model":"tiny","messages":[', "{}", "]}")),
    "stops": (ChatBody, many('{"model":"tiny","messages":[{"role":"user","content":"x"}],"stop":[', "1", "]}")),
    "fields": (ChatBody, ("{" + ",".join(f'"{i:x}":1' for i in range(100_000)) + "}").encode()),
    "preferences": (
        ChatBody,
        json.dumps(
            {"model": "t", "messages": [MESSAGE], "preferences": {f"{i:x}": "" for i in range(90_000)}}
        ).encode(),
    ),
    "in an ignored field": (ChatBody, many('{"model":"tiny","metadata":[', "[]", "]}")),
    "deep": (ChatBody, b'{"metadata":' + b"[" * 100 + b"]" * 100 + b"}"),
    "very deep": (ChatBody, b"[" * 500_000),
    "a list": (ChatBody, many("[", "0", "]")),
    "a number": (ChatBody, b"9" * 1_000_000),
    "escapes": (ChatBody, b'{"model": "' + b"\\\\" * 499_000 + b'"}'),
    "short texts out of place": (ChatBody, rb'\"\\\\"' * 160_000),
    "closing brackets": (ChatBody, b"[" + b"]" * 999_000),
    "not JSON": (ChatBody, b'{"model": \x00' + b"\xff" * 100_000),
}


@pytest.mark.parametrize("name", STORMS)
def test_a_storm_of_errors_is_one_short_answer(name):
    kind, content = STORMS[name]
    tracemalloc.start()
    with pytest.raises(ApiError) as caught:
        parse_body(content, kind)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status == 400
    assert len(caught.value.error.message) < 300
    assert most < 60 * len(content), "Python's own objects for the JSON, and no errors by the hundred thousand"


def ids(one: int, lists: int = 1) -> bytes:
    """A body with prompts of so many token ids each."""
    each = [1] * one
    return json.dumps({"model": "t", "prompt": [each] * lists if lists > 1 else each}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (ids(300_000), "one list has 300000 token ids; at most 512 are taken here; shorten it"),
        (ids(513, 3), "one list has 513 token ids; at most 512"),
        (ids(500, 600), "the body has 300000 token ids; at most 2048 are taken here"),
        (ids(1, 2049), "the body has 2049 token ids; at most 2048 are taken here"),
        (
            ids(300_000)[:-2],
            "one list has 300000 token ids; at most 512",
        ),  # never parsed: nobody saw that it is no JSON
    ],
)
def test_more_ids_than_prompts_can_have_are_refused_by_their_number_alone(content, says):
    tracemalloc.start()
    with pytest.raises(ApiError, match=says) as caught:
        parse_body(content, TextBody, MostIds(512, 2048))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.status, caught.value.error.code) == (400, "context_length_exceeded")
    assert most < 6 * max(len(content), 100_000), "copies of the bytes, and no object for each id"


def test_as_many_ids_as_prompts_can_have_are_taken():
    most = MostIds(512, 2048)
    assert parse_body(ids(512), TextBody, most).prompts() == ((1,) * 512,)
    assert parse_body(ids(512, 4), TextBody, most).prompts() == ((1,) * 512,) * 4
    texts = {"model": "t", "prompt": ["1,2,3", '"1,\\", ', ""] * 300}
    assert len(parse_body(json.dumps(texts).encode(), TextBody, most).prompts()) == 900, "a text is no list of ids"


def test_a_body_is_read_by_one_parser_and_names_each_field_once():
    twice = [
        b'{"model":"t","prompt":"x","model":"u"}',
        b'{"model":"t","prompt":"a:b","preferences":{"a":1,"a":2}}',
        b'{"model":"t","prompt":"x","pr\\u006fmpt":"y"}',  # the same name, spelt in two ways
        b'{"model":"t","prompt":"\\\\","n":1,"n":1}',
    ]
    for content in twice:
        with pytest.raises(ApiError, match="names a field twice") as caught:
            parse_body(content, TextBody)
        assert caught.value.error.code == "duplicate_field"
    odd = {"model": "t", "prompt": '\\":\\\\"{[,:" \\'}
    assert parse_body(json.dumps(odd).encode(), TextBody).prompts() == (odd["prompt"],)


def test_what_is_long_but_sound_is_taken():
    many_ids = list(range(400)) * 300
    assert parse_body(json.dumps({"model": "t", "prompt": many_ids}).encode(), TextBody).prompts() == (tuple(many_ids),)
    several = parse_body(json.dumps({"model": "t", "prompt": [many_ids[:9], [1]]}).encode(), TextBody)
    assert several.prompts() == (tuple(many_ids[:9]), (1,))
    texts = ["{[" * 1000] * 900
    assert parse_body(json.dumps({"model": "t", "prompt": texts}).encode(), TextBody).prompts() == tuple(texts)
    chat = {"model": "t", "messages": [MESSAGE] * 1000}
    assert len(parse_body(json.dumps(chat).encode(), ChatBody).messages) == 1000


def read(**fields):
    content = {"model": "tiny", "messages": [MESSAGE]} | fields
    return parse_body(json.dumps(content).encode(), ChatBody)


def test_an_answer_of_openais_client_is_taken_back_as_history():
    said = ChatCompletionMessage(role="assistant", content="hello")
    dumped = said.model_dump()
    for history in (dumped, dumped | {"annotations": [], "tool_calls": []}, MESSAGE | {"name": None}):
        (prompt,) = read(messages=[MESSAGE, history, MESSAGE]).prompts()
        assert prompt[1] == {"role": history["role"], "content": history["content"]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"tool_calls": [{"id": "1", "type": "function"}]}, "'tool_calls' is not supported by this server"),
        ({"refusal": "No."}, "'refusal' is not supported by this server"),
        ({"wieght": 1}, "unknown field"),
        ({"content": None}, "content: Field required"),
    ],
)
def test_what_a_message_asks_for_in_vain_is_refused(message, says):
    with pytest.raises(ApiError) as refused:
        read(messages=[MESSAGE | message])
    assert says in refused.value.error.message
    assert refused.value.status == 400


def test_a_developer_speaks_as_the_system():
    (prompt,) = read(messages=[{"role": "developer", "content": "Be kind."}, MESSAGE]).prompts()
    assert prompt[0] == {"role": "system", "content": "Be kind."}


def test_stream_options_that_ask_for_nothing_are_taken():
    asked = {"include_usage": True, "include_obfuscation": False}
    assert read(stream=True, stream_options=asked).include_usage
    assert not read(stream=True, stream_options={"include_usage": None}).include_usage
    with pytest.raises(ApiError, match="'include_obfuscation' is not supported"):
        read(stream=True, stream_options={"include_obfuscation": True})

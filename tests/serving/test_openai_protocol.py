"""Request bodies: what is wrong is named in a few words, and finding it costs no more than the body's size."""

import json
import tracemalloc

import pytest

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.http.openai_protocol import ChatBody, TextBody, parse_body

MESSAGE = {"role": "user", "content": "x"}


def many(head: str, item: str, tail: str, size: int = 1_000_000) -> bytes:
    """A body of `size` bytes that is one item again and again."""
    return (head + ",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail).encode()


TEXT = '{"model":"tiny","prompt":['
CHAT = '{"model":"tiny","messages":[{"role":"user","content":['
STORMS = {
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


def test_what_is_long_but_sound_is_taken():
    ids = list(range(400)) * 300
    assert parse_body(json.dumps({"model": "t", "prompt": ids}).encode(), TextBody).prompts() == (tuple(ids),)
    several = parse_body(json.dumps({"model": "t", "prompt": [ids[:9], [1]]}).encode(), TextBody)
    assert several.prompts() == (tuple(ids[:9]), (1,))
    texts = ["{[" * 1000] * 900
    assert parse_body(json.dumps({"model": "t", "prompt": texts}).encode(), TextBody).prompts() == tuple(texts)
    chat = {"model": "t", "messages": [MESSAGE] * 1000}
    assert len(parse_body(json.dumps(chat).encode(), ChatBody).messages) == 1000

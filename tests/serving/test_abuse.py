"""What hostile or broken clients send: nothing crashes the endpoint, holds it up, or makes it tell of its insides."""

import asyncio
import json
import random
import re
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": 4,
    "preferences": {"helpful": 0.5},
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
INSIDES = re.compile(r"Traceback|site-packages|prefvec_ray|\.py\b|0x[0-9a-f]{8}|/(root|home|tmp|usr|work)/|sha256|pv-")


def refused_well(response: httpx.Response) -> bool:
    """An answer, or an error that is the sender's fault, in OpenAI's form and without insides."""
    if response.status_code == 200:
        return True
    error = response.json()["error"]
    told = response.text + str(response.headers)
    return (
        400 <= response.status_code < 500
        and error["type"] in ("invalid_request_error", "requests", "tokens")
        and len(told) < 3000
        and not INSIDES.search(told)
    )


def send_all(endpoint: Any, bodies: list[tuple[str, bytes]]) -> list[httpx.Response]:
    """Sixteen at a time, over connections that stay open."""

    async def send() -> list[httpx.Response]:
        turns = asyncio.Semaphore(16)
        root = endpoint.url.removesuffix("/v1")
        async with httpx.AsyncClient(base_url=root, timeout=120) as client:

            async def one(path: str, content: bytes) -> httpx.Response:
                async with turns:
                    return await client.post(path, content=content, headers={"content-type": "application/json"})

            return await asyncio.gather(*(one(path, content) for path, content in bodies))

    return asyncio.run(send())


@pytest.fixture(scope="module")
def document(endpoint: Any) -> dict[str, Any]:
    return httpx.get(endpoint.url.removesuffix("/v1") + "/openapi.json").json()


@pytest.fixture(autouse=True)
def _still_well(endpoint):
    """Whatever a test has sent, the endpoint answers after it as before."""
    yield
    failed = endpoint.status()["failed"]
    assert endpoint.client.chat.completions.create(model="tiny", messages=ASK["messages"], max_tokens=2)
    assert failed == 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_thousand_malformed_bodies(endpoint, document, path):
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    bodies: list[tuple[str, bytes]] = []

    @settings(
        max_examples=400, database=None, derandomize=True, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def collect(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and len(bodies) % 2:  # an unknown model is soon refused: get past it
            body = body | {"model": "tiny"}
        bodies.append((path, body if isinstance(body, bytes) else json.dumps(body, default=str).encode()))

    collect()
    sound = json.dumps(ASK if path == CHAT else {"model": "tiny", "prompt": "the fox", "max_tokens": 4}).encode()
    draw = random.Random(0)
    for _ in range(150):  # and what no schema knows: bytes lost, changed and doubled
        torn = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(torn))
            torn[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        bodies.append((path, bytes(torn)))
    assert len(bodies) >= 500
    responses = send_all(endpoint, bodies)
    bad = [(body, r.status_code, r.text) for (_, body), r in zip(bodies, responses, strict=True) if not refused_well(r)]
    assert not bad, bad[:3]
    assert sum(response.status_code == 400 for response in responses) > len(bodies) / 2, (
        "not all for their model's name"
    )


def test_oversize_and_absurd_values(endpoint):
    huge = "9" * 5000
    bodies = [json.dumps(ASK | changes).encode() for changes in (
        {"messages": [{"role": "user", "content": "fox " * 11_000}]},
        {"messages": [{"role": "user", "content": "x"}] * 1001},
        {"preferences": {f"p{i}": 0.1 for i in range(101)}},
        {"preferences": {"x" * 40_000: 0.1}},
        {"model": "m" * 40_000},
        {"m" * 40_000: 1},
        {"stop": ["s" * 1001]},
        {"n": 21},
        {"max_tokens": 2**31 - 1},
        {"preferences": {"helpful": 1e308}},
    )]  # fmt: skip
    bodies += [
        json.dumps(ASK).replace("0.5", number).encode()
        for number in ("NaN", "Infinity", "-Infinity", "1e999", huge, f"0.{huge}1e999", '"0.5"', "true", "[0.5]")
    ]
    bodies += [
        b'{"model":"tiny","model":"tiny@reckless","messages":[{"role":"user","content":"x"}]}',
        json.dumps(ASK).replace('"helpful": 0.5', '"harmless": 1, "harmless": -1').encode(),
        json.dumps(ASK | {"metadata": {"a": "b"}}).replace('"a"', '"\\ud800"').encode(),
        b'{"metadata":' + b"[" * 300 + b"]" * 300 + b"}",
        b"x" * 60_000,
    ]
    responses = send_all(endpoint, [(CHAT, body) for body in bodies])
    for body, response in zip(bodies, responses, strict=True):
        assert refused_well(response), (body[:100], response.text[:300])
        assert response.status_code in (400, 404, 413), (body[:100], response.status_code)


def test_prompts_that_are_no_tokens(endpoint):
    prompts = [[], [[]], [-1], [10**6], [2**31], [True], [[1], "a"], [None], {"a": 1}, "", "fox " * 11_000, ["a"] * 21]
    bodies = [(TEXT, json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 2}).encode()) for prompt in prompts]
    for prompt, response in zip(prompts, send_all(endpoint, bodies), strict=True):
        assert response.status_code == 400, (str(prompt)[:50], response.text)
        assert refused_well(response)


HIDDEN: dict[str, Any] = {"vllm_xargs": {"preferences": '{"harmless": -1}', "request": "x"}, "cache_salt": "another's"}
HIDDEN |= {"extra_args": {"preferences": {"harmless": -1}}, "kv_transfer_params": {"do_remote_prefill": True}}
PLACES: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "at the top": lambda name, value: {name: value},
    "in extra_body": lambda name, value: {"extra_body": {name: value}},
    "in extra_json": lambda name, value: {"extra_json": {name: value}},
    "in vllm_xargs": lambda name, value: {"vllm_xargs": {name: value}},
    "in sampling_params": lambda name, value: {"sampling_params": {name: value}},
    "in preferences": lambda name, value: {"preferences": {"helpful": 0.5, name: value}},
    "in a message": lambda name, value: {"messages": [{**ASK["messages"][0], name: value}]},
    "in a part of a message": lambda name, value: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the quick brown fox", name: value}]}]
    },
    "in stream_options": lambda name, value: {"stream": True, "stream_options": {"include_usage": True, name: value}},
    "in response_format": lambda name, value: {"response_format": {"type": "text", name: value}},
    "in logit_bias": lambda name, value: {"logit_bias": {name: value}},
    "in metadata": lambda name, value: {"metadata": {name: json.dumps(value)}},
    "in capitals": lambda name, value: {name.upper(): value},
    "in camel case": lambda name, value: {re.sub("_(.)", lambda found: found[1].upper(), name): value},
    "with a hyphen": lambda name, value: {name.replace("_", "-"): value},
    "with a blank": lambda name, value: {f"{name} ": value},
    "with a full-width letter": lambda name, value: {name.replace("a", "\uff41", 1): value},
    "as a path": lambda name, value: {f"extra_body.{name}": value},
}
IGNORED = {"in metadata"}
"""OpenAI's own field for whatever a caller notes, which goes nowhere"""


def test_nothing_of_vllms_own_is_smuggled_in_anywhere(endpoint):
    sound = ASK | {"temperature": 0}
    expected = endpoint.post(sound)
    bodies = [(place, sound | put(name, value)) for place, put in PLACES.items() for name, value in HIDDEN.items()]
    escaped = [
        json.dumps(sound | {name: value}).replace(f'"{name[0]}', f'"\\u{ord(name[0]):04x}')
        for name, value in HIDDEN.items()
    ]
    twice = [
        json.dumps(sound)[:-1] + f', "{name}": null, "{name}": {json.dumps(value)}}}' for name, value in HIDDEN.items()
    ]
    sent = [(CHAT, json.dumps(body).encode()) for _, body in bodies]
    sent += [(CHAT, body.encode()) for body in escaped + twice]
    places = [place for place, _ in bodies] + ["with an escape"] * len(escaped) + ["twice"] * len(twice)
    text = {name: value for name, value in sound.items() if name != "messages"} | {"prompt": "the quick brown fox"}
    for name, value in HIDDEN.items():
        for changes in ({name: value}, {"extra_body": {name: value}}, {"prompt": [{"prompt": "a", name: value}]}):
            sent.append((TEXT, json.dumps(text | changes).encode()))
            places.append("of a text completion")
    for place, (_, body), response in zip(places, sent, send_all(endpoint, sent), strict=True):
        assert refused_well(response), (place, body, response.text)
        assert response.status_code == (200 if place in IGNORED else 400), (place, body, response.text)
        if response.status_code == 200:
            told, wanted = response.json(), expected.json()
            for each in ("choices", "preferences", "system_fingerprint"):
                assert told[each] == wanted[each]


# --- below HTTP's manners -------------------------------------------------------------------------------------------


def connect(endpoint: Any) -> socket.socket:
    address = urlsplit(endpoint.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def said(connection: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def request(*headers: str | bytes, body: bytes | None = None, path: str = CHAT, method: str = "POST") -> bytes:
    content = json.dumps(ASK).encode() if body is None else body
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    if not any(str(header).lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(content)}")
    raw = b"\r\n".join(
        [*(line.encode() for line in lines), *(h if isinstance(h, bytes) else h.encode() for h in headers)]
    )
    return raw + b"\r\n\r\n" + content


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (request("Authorization: Bearer none", "Authorization: Bearer none"), {401}),
        (request("Authorization: Bearer " + "x" * 8000), {401}),
        (request(b"Authorization: Bearer \xff\xfe\x80"), {400}),
        (request("Authorization: \tBearer   none  "), {200, 401}),
        (request("X-Request-ID: " + "r" * 5000), {200}),
        (request("X-Request-ID: a\r\nSet-Cookie: b=c"), {200}),
        (request("X-Request-ID: {\"a\": 1}"), {200}),
        (request("X-Request-Timeout-Seconds: 0.0001"), {200}),
        (request(b"X-Request-Timeout-Seconds: \xff"), {400}),
        (request(b"X-Request-Disconnect-Disabled: \xff"), {400}),
        (request(b"X-Request-ID: \xff\xfe"), {400}),
        (request(b"Serve_Multiplexed_Model_Id: \xff"), {400}),
        (request("X-Forwarded-For: 127.0.0.1", "X-Original-URL: /healthz", "X-HTTP-Method-Override: GET"), {200}),
        (request("Content-Encoding: gzip"), {200, 400, 415}),
        (request("Expect: 100-continue"), {100, 200}),
        (request("Big: " + "x" * 200_000), {400, 431}),
        (request("Content-Length: -1"), {400}),
        (request("Content-Length: 5", "Content-Length: 500"), {400}),
        (request("Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), {400}),
        (request(path=CHAT + "/../../healthz"), {404, 405}),
        (request(path="/v1//chat/completions"), {404, 405}),
        (request(path="/v1/models/" + "x" * 5000, method="GET", body=b""), {404}),
        (request(path="/v1/models/..%2f..%2fetc%2fpasswd", method="GET", body=b""), {404}),
        (request(path="/v1/models/tiny@%00", method="GET", body=b""), {404}),
        (request(method="PATCH"), {405}),
        (b"GET / HTTP/9.9\r\n\r\n", {400, 404, 505}),
        (b"\x16\x03\x01\x02\x00 hello over TLS\r\n\r\n", {400}),
    ],
)  # fmt: skip
def test_headers_and_request_lines(endpoint, sent, statuses):
    with connect(endpoint) as connection:
        connection.sendall(sent)
        answer = said(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, answer[:500]
    assert b"Set-Cookie: b=c" not in head
    assert not INSIDES.search(body.decode(errors="replace")) or b'"choices"' in body


def test_no_header_keeps_the_work_of_a_caller_that_hung_up(endpoint):
    before = endpoint.status()["cancelled"]
    long = json.dumps(ASK | {"n": 20, "max_tokens": 400, "temperature": 2}).encode()
    with connect(endpoint) as connection:
        connection.sendall(request("X-Request-Disconnect-Disabled: ?1", body=long))
        while not endpoint.status()["running"]:
            time.sleep(0.01)
    while (status := endpoint.status())["running"] + status["waiting"]:
        time.sleep(0.05)
    assert status["cancelled"] > before


def test_a_stream_that_is_broken_off_counts_what_was_generated(endpoint):
    secret = endpoint.key("quitter", tokens_per_minute=20_000)
    headers = {"authorization": f"Bearer {secret}"}
    before = endpoint.status()["tokens"]
    long = ASK | {"stream": True, "n": 8, "max_tokens": 400, "temperature": 2}
    with httpx.stream("POST", endpoint.url + "/chat/completions", json=long, headers=headers, timeout=60) as answer:
        reserved = 20_000 - int(answer.headers["x-ratelimit-remaining-tokens"])
        for line in answer.iter_lines():
            if '"content":' in line and '"content":""' not in line:
                break
    while (status := endpoint.status())["running"] + status["waiting"]:
        time.sleep(0.05)
    generated = status["tokens"] - before
    assert generated < 8 * 400
    asks, used = 0, reserved
    while used > reserved - 1:  # until it is settled, the most that it may use
        asks += 1
        answer = endpoint.post(ASK | {"max_tokens": 1}, authorization=f"Bearer {secret}")
        used = 20_000 - int(answer.headers["x-ratelimit-remaining-tokens"])
        assert asks < 100
        time.sleep(0.05)
    assert used >= generated * 0.8, "all of it, but for what stop strings and half characters held back"


def test_a_body_that_trickles_in_is_given_up(endpoint):
    with connect(endpoint) as connection:
        connection.sendall(request("Content-Length: 1000", body=b"{"))
        began = time.monotonic()
        answer = said(connection)
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - began < 25, "the connection's own limit, had the body's not ended it"
    assert b'"code":"timeout"' in answer


def test_callers_that_never_read_hold_nobody_up(endpoint):
    long = json.dumps(ASK | {"stream": True, "n": 2, "max_tokens": 300, "temperature": 2}).encode()
    stuck = [connect(endpoint) for _ in range(12)]
    try:
        for connection in stuck:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(request(body=long))
        assert endpoint.post(ASK).status_code == 200, "others are answered meanwhile"
        deadline = time.monotonic() + 60
        while (status := endpoint.status())["running"] + status["waiting"]:
            assert time.monotonic() < deadline, f"their answers hold places: {status}"
            time.sleep(0.05)
    finally:
        for connection in stuck:
            connection.close()

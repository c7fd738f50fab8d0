"""Hostile requests for the endpoint: thousands of bodies and heads, seeded and bounded in time.

    python -m tests.fuzz.api --inputs 3000 --seed 0 --seconds 300            # deploys a small endpoint of its own
    python -m tests.fuzz.api --url http://127.0.0.1:8000 --model tiny        # or attacks one that runs

Three kinds of bodies: those that schemathesis makes against the API's own description, sound ones with bytes lost,
changed and doubled, and storms (one item again and again, deep nesting, huge numbers and texts). Every answer must be
one of 200 to 499 in OpenAI's form, without a word of the server's insides, and within `HANG_SECONDS`. The last line of
stdout is one JSON object; the exit status is 1 where an answer was not as it must be.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

HANG_SECONDS = 60.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
INSIDES = re.compile(r"Traceback|site-packages|prefvec_ray|\.py\b|0x[0-9a-f]{8}|/(root|home|tmp|usr|work)/|pv-")
SCRAPS = [
    "{}", "[]", "[[]]", "[{}]", "null", "true", "-1", "1.5", '""', '"a"', "1e400", "9" * 400,
    '{"type":"text","text":""}', '"\\ud800"', '"\\u0000"', '"harmless "', '"harm\\u200bless"', "NaN",
    "-Infinity", '{"a":1,"a":2}',
]  # fmt: skip


def sound(path: str, model: str) -> dict[str, Any]:
    """A body that is answered."""
    common = {"model": model, "max_tokens": 2, "preferences": {"helpful": 0.5}, "stop": ["x"], "n": 1, "seed": 1}
    if path == CHAT:
        return common | {"messages": [{"role": "user", "content": "the fox"}]}
    return common | {"prompt": "the fox"}


def from_schema(document: dict[str, Any], path: str, model: str, count: int, number: int) -> list[bytes]:
    """Bodies that break the API's description, by schemathesis."""
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    bodies: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def collect(case: schemathesis.Case[Any]) -> None:
        body = case.body
        if isinstance(body, dict) and len(bodies) % 2:  # an unknown model is soon refused: get past it
            body = body | {"model": model}
        bodies.append(body if isinstance(body, bytes) else json.dumps(body, default=str).encode())

    collect()
    return bodies


def torn(path: str, model: str, draw: random.Random) -> bytes:
    """A sound body with a few bytes lost, changed or doubled."""
    body = bytearray(json.dumps(sound(path, model)).encode())
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(body))
        body[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    return bytes(body)


def storm(path: str, model: str, draw: random.Random) -> bytes:
    """One field of a sound body replaced by many scraps, nested or not."""
    body = sound(path, model)
    field = draw.choice([*body, "messages", "prompt", "metadata", "logit_bias", "stream_options", "logprobs"])
    scrap = draw.choice(SCRAPS)
    most = draw.choice([1, 3, 200, 5000, 40_000])
    inner = ",".join([scrap] * max(1, min(most, 900_000 // (len(scrap) + 1))))
    depth = draw.choice([0, 1, 1, 2, 40, 400])
    value = "[" * depth + (inner if depth else scrap) + "]" * depth
    if draw.random() < 0.2:
        value = "{" + ",".join(f'"{i:x}":{scrap}' for i in range(min(most, 20_000))) + "}"
    rest = ",".join(f"{json.dumps(name)}:{json.dumps(content)}" for name, content in body.items() if name != field)
    return f'{{{rest},"{field}":{value}}}'.encode()


def heads(draw: random.Random) -> dict[str, str]:
    """Headers that a caller may try."""
    some = {
        "x-request-id": draw.choice(["r" * 2000, "a b", "{}", "1"]),
        "serve-multiplexed-model-id": f"m{draw.random()}",
        "X_Session_Id": f"s{draw.random()}",
        "x-request-timeout-seconds": draw.choice(["0.001", "-1", "x"]),
        "authorization": draw.choice(["Bearer none", "Bearer", "Basic eA=="]),
        "content-encoding": "gzip",
    }
    return {name: value for name, value in some.items() if draw.random() < 0.15}


def wrong(response: httpx.Response) -> str | None:
    """What is wrong with an answer, if anything."""
    if response.status_code >= 500:
        return f"status {response.status_code}"
    if response.status_code == 200:
        return None
    if len(response.content) > 3000:
        return f"an error of {len(response.content)} bytes"
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "no error in OpenAI's form"
    if not isinstance(error.get("message"), str) or INSIDES.search(response.text):
        return "an error with the server's insides, or without a message"
    return None


async def attack(url: str, model: str, inputs: int, number: int, seconds: float) -> dict[str, Any]:
    """Send until there were so many inputs, or so many seconds are over."""
    draw, began = random.Random(number), time.monotonic()
    seen: Counter[str] = Counter()
    bad: list[str] = []
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS) as client:
        document = (await client.get("/openapi.json")).json()
        ready = {path: from_schema(document, path, model, max(1, inputs // 6), number) for path in (CHAT, TEXT)}

        async def one(kind: str, path: str, content: bytes, extra: dict[str, str]) -> None:
            async with gate:
                if time.monotonic() - began > seconds:
                    return
                headers = {"content-type": "application/json"} | extra
                try:
                    response = await client.post(path, content=content, headers=headers)
                    fault = wrong(response)
                    seen[f"{kind} {response.status_code}"] += 1
                except httpx.TransportError as error:
                    fault = type(error).__name__
                    seen[f"{kind} {fault}"] += 1
                if fault:
                    bad.append(f"{kind} {path} {fault}: {content[:120]!r}")

        tasks = []
        for index in range(inputs):
            path = draw.choice([CHAT, TEXT])
            if index % 3 == 0 and ready[path]:
                kind, content = "schema", ready[path].pop()
            elif index % 3 == 1:
                kind, content = "torn", torn(path, model, draw)
            else:
                kind, content = "storm", storm(path, model, draw)
            tasks.append(one(kind, path, content, heads(draw)))
        await asyncio.gather(*tasks)
        answered = (await client.post(CHAT, json=sound(CHAT, model))).status_code
    if answered != 200:
        bad.append(f"afterwards a sound request gets {answered}")
    return {"inputs": sum(seen.values()), "seed": number, "seen": dict(sorted(seen.items())), "bad": bad[:20]}


@contextlib.contextmanager
def endpoint() -> Iterator[tuple[str, str]]:
    """A small endpoint on this process's own cluster: its URL and model."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import os

    import ray
    from serve_world import make_world
    from transformers import AutoTokenizer

    from prefvec_ray.common.cluster import SERVE_SETTINGS
    from prefvec_ray.serving import ServingConfig, start, stop

    os.environ |= SERVE_SETTINGS | {"PREFVEC_REFUSALS_PER_SECOND": "1000"}
    ray.init(address="local", num_cpus=3, namespace="prefvec", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        base, registry = make_world(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        tokenizer.save_pretrained(base)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = ServingConfig.model_validate(
            {
                "model": "tiny",
                "base": base,
                "registry": str(registry.store.folder),
                "vectors": {"harmless": "harmless@1", "helpful": "helpful@production"},
                "floors": {"harmless": 0},
                "ranges": {"harmless": {"min": 0}},
                "engine": {"max_batch": 8, "max_new_tokens": 32},
                "replicas": {"cpus": 0.5},
            }
        )
        yield start(config, port=port).removesuffix("/v1"), "tiny"
        stop()
    ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="nothing new is sent after so long")
    parser.add_argument("--url", help="an endpoint that runs; left out: one is deployed")
    parser.add_argument("--model", default="tiny", help="the model of --url")
    asked = parser.parse_args()
    with contextlib.nullcontext((asked.url, asked.model)) if asked.url else endpoint() as (url, model):
        found = asyncio.run(attack(url, model, asked.inputs, asked.seed, asked.seconds))
    print(json.dumps(found))
    return 1 if found["bad"] or not found["inputs"] else 0


if __name__ == "__main__":
    sys.exit(main())

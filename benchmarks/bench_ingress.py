"""What a streamed token costs on its way from the engine to its caller, and what a second ingress replica changes.

    python benchmarks/bench_ingress.py                   # about eight minutes
    python benchmarks/bench_ingress.py --size 30M --callers 32

The same requests, each at a setting of its own: by the engine alone in one process (steered), and over HTTP in the ways
of `VARIANTS`, by turns. Cost is processor time, by process: replica, fronts with their coordinator, Serve's
proxy; the client's own is left out. The last line of stdout is one JSON object. `cpu_us_per_token` has microseconds by
process, `over_engine` how many times the engine's own the ingress (fronts and proxy) costs, `two_over_one` the ratio of
tokens a second with two fronts to one, where the client and everything else share the machine's processors. Medians
over the rounds.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil
import ray
import torch
from merge_models import SIZES
from serve_world import load_vectors, make_world, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefvec_ray.common.cluster import SERVE_GRPC, SERVE_SETTINGS
from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.engines.base import Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import SteeredWeights
from prefvec_ray.vectors import Steering, fingerprint

NEW_TOKENS = 64
PARTS = {"front": "fronts", "coordinator": "fronts", "replica": "replica"}
"""of an endpoint: its deployments"""
VARIANTS: dict[str, dict[str, Any]] = {
    "by Ray objects": {"grpc": False},
    "one front": {},
    "two fronts": {"fronts": 2},
    "stream_interval 4": {"interval": 4},
}
REFS = {"harmless": "harmless@1", "helpful": "helpful@1"}


def coefficients(number: int, callers: int) -> dict[str, float]:
    return {"harmless": 0.5, "helpful": 2 * number / callers - 1}


def engine_alone(base: Path, registry: Any, asked: list[list[int]], each: int) -> float:
    """Microseconds of processor time a token, `each` requests a caller, all callers at once."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    pieces: list[Any] = []
    with Steering(model, load_vectors(registry, REFS), base_fingerprint=fingerprint(base)) as steering:
        engine = SlotEngine(SteeredWeights(steering), AutoTokenizer.from_pretrained(base), max_batch=len(asked))
        began = time.process_time()
        for _ in range(each):
            for number, prompt in enumerate(asked):
                setting = tuple(coefficients(number, len(asked)).items())
                sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
                engine.submit(Request(tuple(prompt), setting, sampling), pieces.append)
            while engine.step():
                pass
        spent = time.process_time() - began
    return 1e6 * spent / sum(len(piece.tokens) for piece in pieces)


def processor_seconds() -> dict[str, float]:
    """Of the endpoint's processes since they started, by their part."""
    found: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title = " ".join(process.info["cmdline"] or ())
        part = "proxy" if title.startswith("ray::ProxyActor") else None
        if title.startswith("ray::ServeReplica:prefvec:"):
            name = title.split(":")[4].split(".")[0].split(" ")[0]
            part = PARTS.get(name.partition("-")[0])
        if part:
            found[part] += sum(process.info["cpu_times"][:2])
    return found


async def stream(url: str, asked: list[list[int]], each: int) -> int:
    """Tokens of all callers' streams, `each` requests one after the other."""

    async def call(client: httpx.AsyncClient, number: int) -> int:
        received = 0
        body = {
            "model": "bench",
            "prompt": asked[number],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "preferences": coefficients(number, len(asked)),
        }
        for _ in range(each):
            async with client.stream("POST", f"{url}/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if '"usage":{' in line:
                        received += json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
        return received

    limits = httpx.Limits(max_connections=len(asked))
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        return sum(await asyncio.gather(*(call(client, number) for number in range(len(asked)))))


def over_http(
    base: Path,
    registry: Any,
    asked: list[list[int]],
    each: int,
    *,
    fronts: int = 1,
    interval: int = 1,
    grpc: bool = True,
) -> dict[str, float]:
    """Microseconds of processor time a token by part, and tokens a second, on a cluster of its own."""
    os.environ |= SERVE_SETTINGS | {SERVE_GRPC: str(int(grpc))}
    ray.init(address="local", num_cpus=4, namespace="prefvec", log_to_driver=False)
    config = ServingConfig.model_validate(
        {
            "model": "bench",
            "base": base,
            "registry": str(registry.store.folder),
            "vectors": REFS,
            "engine": {
                "mode": "steered",
                "max_batch": len(asked),
                "max_new_tokens": NEW_TOKENS,
                "stream_interval": interval,
            },
            "ingress_replicas": fronts,
        }
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = start(config, port=port)
    asyncio.run(stream(url, asked, 1))  # warm
    before, began = processor_seconds(), time.monotonic()
    tokens = asyncio.run(stream(url, asked, each))
    seconds, after = time.monotonic() - began, processor_seconds()
    stop()
    ray.shutdown()
    assert tokens == each * len(asked) * NEW_TOKENS
    spent = {part: 1e6 * (after[part] - before[part]) / tokens for part in after}
    return {**spent, "tokens_per_s": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="requests of each caller")
    given = parser.parse_args()
    torch.set_num_threads(1)
    alone: list[float] = []
    served: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        base, registry = make_world(Path(folder), given.size)
        asked = prompts(given.callers, 32, SIZES[given.size][-1])
        for number in range(given.rounds):
            alone.append(engine_alone(base, registry, asked, given.each))
            for name, variant in VARIANTS.items():
                served[name].append(over_http(base, registry, asked, given.each, **variant))
                print(f"round {number + 1}, {name}: {served[name][-1]}", file=sys.stderr, flush=True)
    engine = statistics.median(alone)
    cost = {
        name: {part: round(statistics.median(one[part] for one in found), 1) for part in found[0]}
        for name, found in served.items()
    }
    pairs = zip(served["one front"], served["two fronts"], strict=True)
    print(
        json.dumps(
            {
                "size": given.size,
                "callers": given.callers,
                "engine_us_per_token": round(engine, 1),
                "cpu_us_per_token": cost,
                "over_engine": {k: round((each["fronts"] + each["proxy"]) / engine, 2) for k, each in cost.items()},
                "two_over_one": round(statistics.median(b["tokens_per_s"] / a["tokens_per_s"] for a, b in pairs), 3),
            }
        )
    )


if __name__ == "__main__":
    main()

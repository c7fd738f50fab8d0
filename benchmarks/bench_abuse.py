"""What one hostile caller at full rate does to everybody else: others' time to the first token, quiet and under attack.

    python benchmarks/bench_abuse.py                     # about eight minutes
    python benchmarks/bench_abuse.py --rounds 1 --kind "long prompts that fit"

One endpoint on a small model. Two well-behaved callers with keys stream short answers without a pause, first alone,
then beside a hostile caller with a key of its own who keeps eight requests of one kind under way. The hostile key may
have 4 requests at once, as any operator would set; nothing else singles it out. The last line of stdout is one JSON
object: for each kind and round the others' p50 and p99 first-token time in milliseconds, and the ratio of the p99 to
the quiet one (quiet is measured before and after, and the larger p99 of the two is taken, since machines are shared).
`p99_ratio` is each kind's median over the rounds. Exits with 1 where one is above 2.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import ray
from serve_world import make_world

from prefvec_ray.common.cluster import SERVE_SETTINGS
from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.access.keys import add_key

CHAT, TEXT = "/chat/completions", "/completions"
JSON = {"content-type": "application/json"}
HOSTILE_AT_ONCE = 8


def storm(head: str, item: str, tail: str, size: int = 1_000_000) -> bytes:
    """A body of `size` bytes that is one item again and again."""
    return (head + ",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail).encode()


def prompt(text: Any, **more: Any) -> bytes:
    return json.dumps({"model": "abuse", "prompt": text, "max_tokens": 1} | more).encode()


ATTACKS: dict[str, tuple[str, bytes]] = {
    "errors in a prompt": (TEXT, storm('{"model":"abuse","prompt":[', "{}", "]}")),
    "errors in a list of ids": (TEXT, storm('{"model":"abuse","prompt":[[', "{}", "]]}")),
    "ids beyond the context": (TEXT, prompt([1] * 300_000)),
    "a text without spaces": (TEXT, prompt("ab" * 475_000)),
    "a text of words": (TEXT, prompt("w7 " * 316_000)),
    "sixteen texts": (TEXT, prompt(["w7 " * 19_000] * 16)),
    "long prompts that fit": (TEXT, prompt([5] * 200, max_tokens=32)),
}


async def well_behaved(
    client: httpx.AsyncClient, until: asyncio.Event, waits: list[float], failed: Counter[str]
) -> None:
    """Streams short answers; notes the time to each first piece, in milliseconds."""
    body = prompt([3, 4, 5], max_tokens=4, stream=True, preferences={"helpful": 0.5})
    while not until.is_set():
        began = time.perf_counter()
        async with client.stream("POST", TEXT, content=body) as answer:
            if answer.status_code != 200:
                failed[str(answer.status_code)] += 1
                await answer.aread()
                continue
            first = None
            async for line in answer.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = 1000 * (time.perf_counter() - began)
            if first is not None:
                waits.append(first)


async def hostile(
    client: httpx.AsyncClient, attack: tuple[str, bytes], until: asyncio.Event, seen: Counter[str]
) -> None:
    path, body = attack
    while not until.is_set():
        answer = await client.post(path, content=body)
        seen[str(answer.status_code)] += 1


def _client(url: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers=JSON | {"authorization": f"Bearer {key}"}, timeout=120)


async def phase(url: str, keys: list[str], seconds: float, attack: tuple[str, bytes] | None = None) -> dict[str, Any]:
    """Others' first-token times while the attack goes on, or without any."""
    until, waits = asyncio.Event(), []
    failed: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as clients:
        # All before the first request: making a client takes tens of milliseconds, for which this loop stands still.
        made = [await clients.enter_async_context(_client(url, key)) for key in keys]
        tasks = [asyncio.create_task(well_behaved(client, until, waits, failed)) for client in made[1:]]
        if attack:
            tasks += [asyncio.create_task(hostile(made[0], attack, until, seen)) for _ in range(HOSTILE_AT_ONCE)]
        await asyncio.sleep(seconds)
        until.set()
        await asyncio.gather(*tasks)
    waits.sort()
    return {
        "answers": len(waits),
        "p50_ms": round(waits[len(waits) // 2], 1) if waits else math.inf,
        "p99_ms": round(waits[min(len(waits) - 1, int(len(waits) * 0.99))], 1) if waits else math.inf,
        "failed": dict(failed),
        "hostile": dict(seen),
    }


def measure(seconds: float, rounds: int, kinds: list[str], mode: str) -> dict[str, Any]:
    """The kinds, one after the other, on one endpoint."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        base, registry = make_world(Path(folder))
        keys = Path(folder) / "keys.yaml"
        secrets = [add_key(keys, "hostile", requests_at_once=4)[1]]
        secrets += [add_key(keys, f"team-{number}")[1] for number in range(2)]
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = ServingConfig.model_validate(
            {
                "model": "abuse",
                "base": base,
                "registry": str(registry.store.folder),
                "vectors": {"harmless": "harmless@1", "helpful": "helpful@1"},
                "keys": keys,
                "engine": {"mode": mode, "max_batch": 8, "max_new_tokens": 32},
                "replicas": {"cpus": 0.5},
            }
        )
        url = start(config, port=port)
        asyncio.run(phase(url, secrets, min(3.0, seconds)))  # warm
        quiet = [asyncio.run(phase(url, secrets, seconds))]
        under: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                found = asyncio.run(phase(url, secrets, seconds, ATTACKS[kind]))
                quiet.append(asyncio.run(phase(url, secrets, seconds)))
                found["p99_ratio"] = round(found["p99_ms"] / max(each["p99_ms"] for each in quiet[-2:]), 2)
                under[kind].append(found)
                line = f"{mode}, {kind}: {found['p99_ms']} ms, {found['p99_ratio']} of quiet"
                print(line, file=sys.stderr, flush=True)
        stop()
    ratios = {kind: statistics.median(found["p99_ratio"] for found in under[kind]) for kind in kinds}
    load = os.getloadavg()[0]
    return {
        "mode": mode,
        "seconds": seconds,
        "load_average": round(load, 1),
        "quiet": quiet,
        "under": under,
        "p99_ratio": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=ATTACKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--mode", choices=("merged", "steered"), default="merged", help="of the engine")
    asked = parser.parse_args()
    os.environ |= SERVE_SETTINGS
    ray.init(address="local", num_cpus=3, namespace="prefvec", log_to_driver=False)
    found = measure(asked.seconds, asked.rounds, asked.kind or list(ATTACKS), asked.mode)
    ray.shutdown()
    print(json.dumps(found))
    sys.exit(0 if max(found["p99_ratio"].values()) <= 2 else 1)


if __name__ == "__main__":
    main()

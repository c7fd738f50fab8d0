"""What one caller's requests do to another's first token in the slot engine alone, in its processor time.

    python benchmarks/bench_shares.py --mode merged

Two well-behaved callers ask for short answers, each again 20 to 40 ms after the last, first alone, then beside a
hostile one that always has four requests under way. No HTTP, no Ray, one thread; the clock is the processor time of
this thread, so that other programs do not count. The last line of stdout is one JSON object: for each kind the
others' p50 and p99 first-token time in milliseconds, the p99 over the quiet one, all callers' tokens per second, the
hostile caller's share of them, and how often a second the weights were rewritten.
"""

import argparse
import heapq
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from serve_world import load_vectors, make_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, Steering

AT_ONCE = 4
"""requests that the hostile caller's key allows"""


class Clock:
    """Processor time of this thread, and what was skipped while there was nothing to do."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.thread_time() + self.skipped


def request(caller: str, eta: float, prompt: int, answer: int) -> Request:
    sampling = SamplingParams(max_tokens=answer, temperature=0.0)
    return Request((5,) * prompt, (("harmless", 0.0), ("helpful", eta)), sampling, caller=caller)


HOSTILE: dict[str, Callable[[int], Request]] = {
    "long prompts, one setting": lambda i: request("hostile", 0.0, 200, 32),
    "long prompts, a setting each": lambda i: request("hostile", i % 97 / 97, 200, 32),
    "short answers, a setting each": lambda i: request("hostile", i % 97 / 97, 3, 1),
    "long answers, a setting each": lambda i: request("hostile", i % 97 / 97, 3, 400),
    "the longest prompts": lambda i: request("hostile", 0.0, 1000, 1),
}


def phase(
    engine: SlotEngine, clock: Clock, seconds: float, etas: list[float], hostile: Callable[[int], Request] | None
) -> dict[str, Any]:
    """The well-behaved callers at these settings, beside the hostile one if there is one."""
    draw, waits, due = random.Random(0), [], [(clock(), i) for i in range(len(etas))]
    began, asked, ended = clock(), 0, 0
    tokens = {"well-behaved": 0, "hostile": 0}
    merges = engine.status().merges
    under_way: list[Any] = []

    def ask(caller: int, at: float) -> None:
        received = 0

        def emit(delta: Any) -> None:
            nonlocal received, ended
            assert isinstance(delta, OutputDelta), delta
            if not received:
                waits.append(1000 * (clock() - at))
            received += len(delta.tokens)
            if delta.finish_reason:
                ended += 1
                tokens["well-behaved"] += received
                heapq.heappush(due, (clock() + draw.uniform(0.02, 0.04), caller))

        engine.submit(request(f"team-{caller}", etas[caller], 3, 4), emit)

    def attack() -> None:
        nonlocal asked

        def emit(delta: Any) -> None:
            tokens["hostile"] += len(delta.tokens)
            if delta.finish_reason and clock() - began < seconds:
                attack()

        asked += 1
        under_way.append(engine.submit(hostile(asked), emit))  # type: ignore[misc]

    for _ in range(AT_ONCE if hostile else 0):
        attack()
    while clock() - began < seconds:
        while due and due[0][0] <= clock():
            ask(*reversed(heapq.heappop(due)))
        if not engine.step():
            clock.skipped += max(0.0, due[0][0] - clock())
    elapsed = clock() - began
    for each in under_way:
        each.cancel()
    while engine.step():
        pass
    waits.sort()
    total = sum(tokens.values())
    return {
        "answers": ended,
        "p50_ms": round(statistics.median(waits), 1),
        "p99_ms": round(waits[int(len(waits) * 0.99)], 1),
        "tokens_per_s": round(total / elapsed),
        "hostile_share": round(tokens["hostile"] / total, 2),
        "switches_per_s": round((engine.status().merges - merges) / elapsed, 1),
    }


def measure(mode: str, size: str, seconds: float, kinds: list[str]) -> dict[str, Any]:
    clock = Clock()
    time.monotonic = clock  # the engine's own clock too
    with tempfile.TemporaryDirectory() as folder:
        base, registry = make_world(Path(folder), size)
        vectors = load_vectors(registry, {"harmless": "harmless@1", "helpful": "helpful@1"})
        model = AutoModelForCausalLM.from_pretrained(base)
        weights = (
            MergedWeights(LiveModel(model, vectors, threads=1))
            if mode == "merged"
            else SteeredWeights(Steering(model, vectors))
        )
        engine = SlotEngine(weights, AutoTokenizer.from_pretrained(base), max_batch=8)
        found: dict[str, Any] = {}
        for name, etas in (("one setting", [0.5, 0.5]), ("two settings", [0.5, -0.5])):
            phase(engine, clock, 1, etas, None)  # warm
            quiet = phase(engine, clock, seconds, etas, None)
            found[name] = {"quiet": quiet}
            for kind in kinds:
                seen = phase(engine, clock, seconds, etas, HOSTILE[kind])
                found[name][kind] = seen | {"p99_ratio": round(seen["p99_ms"] / quiet["p99_ms"], 1)}
                print(f"{name}, {kind}: {found[name][kind]}", file=sys.stderr, flush=True)
    return {"mode": mode, "size": size, "others_at": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("merged", "steered"), default="merged", help="of the engine")
    parser.add_argument("--size", default="1M")
    parser.add_argument("--seconds", type=float, default=8, help="of each phase")
    parser.add_argument("--kind", choices=HOSTILE, action="append", help="only this one; may be repeated")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(asked.mode, asked.size, asked.seconds, asked.kind or list(HOSTILE))))


if __name__ == "__main__":
    main()

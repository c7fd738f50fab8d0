"""The endpoint at capacity while replicas are killed, a preset is moved and new vectors are rolled out.

    python benchmarks/load_serve.py                      # 10 minutes, a replica killed every 30 s
    python benchmarks/load_serve.py --seconds 40 --kill-every 10

As many callers as two replicas have rows, and half as many again, ask without pause through OpenAI's client with its
own two retries: coefficients of their own, presets by alias, streams. Every answer's text is compared with what one
model, merged for its fingerprint alone, gives; where they part, the two logits are told. A stream that has begun
cannot be repeated by the client; those that a kill cut are counted by themselves. The preset's alias moves twice,
`helpful` goes to its next version half-way.
The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import ray
import torch
from merge_models import SIZES
from openai import APIError, OpenAI
from ray.util.state import list_actors
from serve_world import load_vectors, make_world, prompts
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefvec_ray.registry import Registry
from prefvec_ray.serving import ServingConfig, roll_out, start, stop
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.vectors import LiveModel

ROWS, NEW = 8, 32
TIE = 1e-4
"""in logits of about 10, which the shape of a batch moves by up to 6e-5 here"""
SETTINGS: list[dict[str, float]] = [{"helpful": i / 4 - 1, "harmless": i % 3 / 2} for i in range(6)]
PRESETS = [{"harmless": 0.75}, {"harmless": 0.25}]


@dataclass(frozen=True)
class Truth:
    """What one merged model says, and how sure it is of every token."""

    tokens: list[int]
    seconds: list[int]
    """the second best at each place"""
    best_two: list[list[float]]
    """the logits of both"""

    def judge(self, text: str) -> tuple[str, str]:
        """("right", ""), or ("tie", where) or ("wrong", where): a tie took the second best where both lie closer than
        the shape of a batch moves them; what follows it is another answer, and not compared."""
        said = [int(word) for word in re.findall(r"w(\d+)", text)]  # how words are spaced is the tokenizer's affair
        place = next((i for i, pair in enumerate(zip_longest(said, self.tokens)) if pair[0] != pair[1]), None)
        if place is None:
            return "right", ""
        if place >= min(len(said), len(self.tokens)):
            return "wrong", f"{len(said)} tokens, not {len(self.tokens)}"
        (best, second), token = self.best_two[place], said[place]
        where = (
            f"token {place}: w{token}, not w{self.tokens[place]} ({best:.7f}, then w{self.seconds[place]} {second:.7f})"
        )
        return ("tie" if token == self.seconds[place] and best - second < TIE else "wrong"), where


class Truths(dict[tuple[str, int], Truth]):
    """By fingerprint and number of the prompt, for both versions of `helpful`."""

    def __init__(self, config: ServingConfig, registry: Registry, asked: list[list[int]]):
        for version in ("helpful@1", "helpful@2"):
            refs = {"harmless": "harmless@1", "helpful": version}
            release = resolve_release(config.model_copy(update={"vectors": refs}))
            live = LiveModel(AutoModelForCausalLM.from_pretrained(config.base).eval(), load_vectors(registry, refs))
            for setting in SETTINGS + PRESETS:
                coefficients = release.policy.coefficients(setting)
                live.set_coefficients(dict(coefficients))
                for number, prompt in enumerate(asked):
                    self[release.fingerprint(coefficients), number] = _truth(live.model, prompt)


@torch.inference_mode()
def _truth(model: PreTrainedModel, prompt: list[int]) -> Truth:
    ids = torch.tensor([prompt])
    told = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_T2 = torch.cat(told.logits).topk(2)
    return Truth(told.sequences[0, len(prompt) :].tolist(), best_T2.indices[:, 1].tolist(), best_T2.values.tolist())


class Callers:
    """Ask until `done`; `told` counts how it went."""

    def __init__(self, url: str, asked: list[list[int]], truths: Truths):
        self.url, self.asked, self.truths = url, asked, truths
        self.told: Counter[str] = Counter()
        self.first_ms: list[float] = []
        self.errors: Counter[str] = Counter()
        self.done = threading.Event()

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        with OpenAI(base_url=self.url, api_key="none", timeout=120) as client:
            while not self.done.is_set():
                number, kind = draw.randrange(len(self.asked)), draw.choice(["free", "free", "preset", "stream"])
                ask: dict[str, Any] = {"prompt": self.asked[number], "temperature": 0, "max_tokens": NEW}
                if kind == "preset":
                    ask["model"] = "load@safe@production"
                else:
                    ask |= {"model": "load", "extra_body": {"preferences": draw.choice(SETTINGS)}}
                try:
                    text, fingerprint = self.stream(client, ask) if kind == "stream" else self.whole(client, ask)
                except APIError as error:
                    cut = kind == "stream" and getattr(error, "status_code", None) is None
                    self.told["streams_cut" if cut else "failed"] += 1
                    self.errors[f"{type(error).__name__}: {error}"[:160]] += 1
                    continue
                self.told[kind] += 1
                truth = self.truths.get((fingerprint, number))
                verdict, where = truth.judge(text) if truth else ("wrong", "no such fingerprint")
                self.told[verdict] += 1
                if verdict != "right":
                    print(f"{verdict}, {kind}, prompt {number}, {fingerprint[:23]}: {where}", file=sys.stderr)

    def whole(self, client: OpenAI, ask: dict[str, Any]) -> tuple[str, str]:
        answer = client.completions.create(**ask)
        return answer.choices[0].text, answer.system_fingerprint or ""

    def stream(self, client: OpenAI, ask: dict[str, Any]) -> tuple[str, str]:
        began, text, fingerprint = time.monotonic(), "", ""
        for chunk in client.completions.create(**ask, stream=True):
            if not text and chunk.choices and chunk.choices[0].text:
                self.first_ms.append(1000 * (time.monotonic() - began))
            text += chunk.choices[0].text if chunk.choices else ""
            fingerprint = chunk.system_fingerprint or fingerprint
        return text, fingerprint


def actors(of: str, dashboard: str) -> list[Any]:
    """Of this very cluster: others may run on the machine."""
    alive = list_actors(address=dashboard, filters=[("state", "=", "ALIVE")], limit=1000, detail=True)
    return [actor for actor in alive if f"ServeReplica:prefvec:{of}" in actor.class_name]


def slope_mb_per_minute(samples: list[tuple[float, float]]) -> float | None:
    """Of the second half: the first fills caches."""
    late = samples[len(samples) // 2 :]
    if len(late) <= 2:
        return None
    seconds, megabytes = np.array(late).T
    return round(float(np.polyfit(seconds, megabytes, 1)[0]) * 60, 3)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of its own; the value: its dashboard's URL."""
    context = ray.init(address="local", num_cpus=4, namespace="prefvec", log_to_driver=False)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


def load(dashboard: str, seconds: float, kill_every: float, size: str = "1M", fewest: int = 0) -> dict[str, Any]:
    """Deploy, and do all of it, on this process's cluster: for `seconds`, and until there were `fewest` kills."""
    with tempfile.TemporaryDirectory() as folder:
        base, registry = make_world(Path(folder), size)
        config = ServingConfig.model_validate(
            {
                "model": "load",
                "base": base,
                "registry": str(registry.store.folder),
                "vectors": {"harmless": "harmless@1", "helpful": "helpful@production"},
                "engine": {"max_batch": ROWS, "max_new_tokens": NEW},
                "replicas": {"min": 2, "max": 2, "cpus": 0.5},
            }
        )
        asked = prompts(6, 150, SIZES[size][-1])
        truths = Truths(config, registry, asked)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        callers = Callers(start(config, port=port), asked, truths)
        threads = [threading.Thread(target=callers.run, args=(seed,), daemon=True) for seed in range(3 * ROWS)]
        for thread in threads:
            thread.start()
        (front,) = (psutil.Process(actor.pid) for actor in actors("front", dashboard))
        began, kills, moves, rolled, samples = time.monotonic(), 0, 0, 0, []
        while (now := time.monotonic() - began) < seconds or kills < fewest:
            samples.append((now, front.memory_info().rss / 1e6))
            due = now > kill_every * (kills + 1) and (seconds - now > kill_every / 2 or kills < fewest)
            if due and len(victims := actors("replica", dashboard)) > 1:  # the other one answers meanwhile
                ray.kill(ray.get_actor(random.choice(victims).name, "serve"), no_restart=False)
                kills += 1
            if moves < 2 and now > seconds * (moves + 1) / 3:
                moves += 1
                registry.set_alias("safe", "production", 3 - moves, "a move", subject="presets")
            if not rolled and now > seconds / 2:
                registry.set_alias("helpful", "production", 2, "the next version")
                rolled = roll_out(config).generation
            time.sleep(1)
        callers.done.set()
        for thread in threads:
            thread.join()
        stop()
    told = callers.told
    answered = told["free"] + told["preset"] + told["stream"]
    first = sorted(callers.first_ms) or [float("nan")]
    return {
        "seconds": seconds,
        "answered": answered,
        "answers_per_s": round(answered / seconds, 1),
        "failed_after_retries": told["failed"],
        "wrong": told["wrong"],
        "ties": told["tie"],
        "streams_cut_by_kills": told["streams_cut"],
        "kills": kills,
        "preset_moves": moves,
        "generation": rolled,
        "front_memory_mb": [round(mb) for _, mb in samples[::60]],
        "front_memory_mb_per_minute": slope_mb_per_minute(samples),
        "ttft_ms": {"p50": round(first[len(first) // 2], 1), "p99": round(first[int(len(first) * 0.99)], 1)},
        "errors": dict(callers.errors.most_common(5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kill-every", type=float, default=30)
    parser.add_argument("--size", default="1M", help=f"of {', '.join(SIZES)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with cluster() as dashboard:
        found = load(dashboard, given.seconds, given.kill_every, given.size)
    print(json.dumps(found))
    sys.exit(bool(found["wrong"] or found["failed_after_retries"]))


if __name__ == "__main__":
    main()

"""Serving, measured: the engine at 48 settings against itself without any, the usual ways, and the first word.

    python benchmarks/bench_serve.py --size 30M --rounds 3

Engine figures are those of bench_engine.py (CPU seconds of one thread), with PEFT's `adapter_names` added: one batch of
the same 48 requests, padded, every setting as a LoRA adapter of its own. `vllm` has what bench_vllm.py measures of the
other engine. Routing: changes of weights a request when
merged engines stand side by side, by `routing.preferred` against the less loaded of two by chance. `ttft_ms` comes over
HTTP through OpenAI's client, `--callers` streams at once, each at a setting of its own. The last line is one JSON
object.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
import torch
from bench_engine import RANK, measure, requests
from merge_models import PROJECTIONS, SIZES, config_of, low_rank_vectors
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from serve_world import make_world, prompts
from transformers import LlamaForCausalLM

from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.engines.base import Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights
from prefvec_ray.serving.release.routing import preferred
from prefvec_ray.vectors import LiveModel, fingerprint

READY = """
import asyncio, sys, time
began = time.perf_counter()
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.serving.replica import Replica
config = ServingConfig(model="bench", base=sys.argv[1], registry=sys.argv[2], engine={"mode": sys.argv[3]})
replica = Replica.__new__(Replica)
asyncio.run(replica.__init__(config, resolve_release(config)))
print(time.perf_counter() - began, flush=True)
import os
os._exit(0)
"""


def peft_tokens_per_s(size: str) -> float:
    """48 adapters of rank 2 x 16, a batch with a row for each, as long as its longest answer."""
    asked = requests(48)
    config = config_of(size)
    config.update({"dtype": "float32", "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    vectors = low_rank_vectors(config, fingerprint(model), RANK)
    lora = LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=list(PROJECTIONS))
    peft = get_peft_model(model, lora, adapter_name="a0")
    for number in range(1, len(asked)):
        peft.add_adapter(f"a{number}", lora)
    peft.eval()
    modules = dict(peft.base_model.model.named_modules())
    for name in next(iter(vectors.values())).names():
        layer = modules[name.removesuffix(".weight")]
        entries = [vectors[preference].entries[name] for preference, _ in asked[0].coefficients]
        for number, request in enumerate(asked):
            up = [entry.B_OR * eta for entry, (_, eta) in zip(entries, request.coefficients, strict=True)]
            layer.lora_A[f"a{number}"].weight.data = torch.cat([entry.A_RI for entry in entries])
            layer.lora_B[f"a{number}"].weight.data = torch.cat(up, 1)
    width = max(len(request.prompt) for request in asked)
    ids = torch.tensor([[0] * (width - len(request.prompt)) + list(request.prompt) for request in asked])
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in asked])
    start = time.process_time()
    with torch.inference_mode():
        peft.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request.max_tokens for request in asked),
            do_sample=False,
            adapter_names=[f"a{number}" for number in range(len(asked))],
        )
    return sum(request.max_tokens for request in asked) / (time.process_time() - start)


def on_vllm(size: str, rounds: int) -> dict[str, Any]:
    """bench_vllm.py in its own environment; where that is missing, what to do about it."""
    python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        return {"missing": "make env-vllm makes the environment that vLLM needs"}
    command = [python, Path(__file__).with_name("bench_vllm.py"), "--size", size, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


Choose = Callable[[Hashable, Mapping[str, int]], str]


def merges_per_request(settings: int, replicas: int, choose: Choose) -> float:
    """Real merged engines of a small model side by side, 8 requests a replica under way, 400 requests in all."""
    config = config_of("1M")
    config.update({"dtype": "float32", "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    base = fingerprint(model)
    vectors = low_rank_vectors(config, base, 2)
    engines = {}
    for number in range(replicas):
        own = LlamaForCausalLM(config).eval()
        own.load_state_dict(model.state_dict())
        live = LiveModel(own, vectors, base_fingerprint=base, threads=1)
        # The engines share one thread here, so a turn by the clock holds so many times fewer steps.
        engines[f"r{number}"] = SlotEngine(MergedWeights(live), _no_words(), max_batch=8, switch_share=0.1 / replicas)
    draw, loads, asked = random.Random(0), dict.fromkeys(engines, 0), 0

    def done(name: str) -> Callable[[Any], None]:
        def emit(piece: Any) -> None:
            loads[name] -= bool(getattr(piece, "finish_reason", None))

        return emit

    while asked < 400 or any(loads.values()):
        while asked < 400 and sum(loads.values()) < 8 * replicas:
            eta = draw.randrange(settings) / settings
            setting = (("harmless", eta), ("helpful", 0.5))
            name = choose(setting, loads)
            loads[name] += 1
            sampling = SamplingParams(max_tokens=draw.randrange(8, 24), temperature=0.0)
            request = Request((1, 2, 3, 4), setting, sampling)
            engines[name].submit(request, done(name))
            asked += 1
        for engine in engines.values():
            engine.step()
    return round(sum(engine.status().merges for engine in engines.values()) / asked, 3)


def _no_words() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["1M"][-1])}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


def routing() -> dict[str, dict[str, float]]:
    draw = random.Random(1)

    def by_chance(setting: Hashable, loads: Mapping[str, int]) -> str:
        two = draw.sample(sorted(loads), min(2, len(loads)))
        return min(two, key=lambda name: loads[name])

    found = {}
    for settings, replicas in ((4, 2), (12, 4), (48, 4)):
        found[f"{settings} settings, {replicas} replicas"] = {
            "by_setting": merges_per_request(settings, replicas, lambda s, loads: preferred(s, loads)[0]),
            "by_chance": merges_per_request(settings, replicas, by_chance),
        }
    return found


def endpoint(size: str, mode: str, callers: int, each: int) -> dict[str, float]:
    """Milliseconds from a stream's request to its first text, and seconds that a replica takes to be ready."""
    with tempfile.TemporaryDirectory() as folder:
        base, registry = make_world(Path(folder), size)
        root = str(registry.store.folder)
        ready = [
            float(subprocess.run([sys.executable, "-c", READY, base, root, mode], **_QUIET).stdout) for _ in range(3)
        ]
        config = ServingConfig.model_validate(
            {
                "model": "bench",
                "base": base,
                "registry": root,
                "engine": {"mode": mode, "max_batch": 48, "max_new_tokens": 128},
            }
        )
        asked = prompts(callers, 200, SIZES[size][-1])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = start(config, port=port)
        first: list[float] = []

        def call(number: int) -> None:
            with OpenAI(base_url=url, api_key="none", timeout=300) as client:
                for turn in range(each + 1):
                    began, spoken = time.monotonic(), False
                    preferences = {"helpful": 2 * number / callers - 1, "harmless": turn / (each + 1)}
                    for chunk in client.completions.create(
                        model="bench",
                        prompt=asked[number],
                        max_tokens=32,
                        temperature=0,
                        stream=True,
                        extra_body={"preferences": preferences},
                    ):
                        if not spoken and chunk.choices and chunk.choices[0].text:
                            spoken = True
                            if turn:  # the first time connects and warms
                                first.append(1000 * (time.monotonic() - began))

        threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop()
    first.sort()
    return {
        "ttft_ms_p50": round(first[len(first) // 2], 1),
        "ttft_ms_p99": round(first[int(len(first) * 0.99)], 1),
        "replica_ready_s": round(statistics.median(ready), 2),
    }


_QUIET: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "check": True, "text": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="30M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = measure(given.size, given.rounds, "cpu")
    speed = engine["tokens_per_s"]
    peft = statistics.median(peft_tokens_per_s(given.size) for _ in range(given.rounds))
    vllm = on_vllm(given.size, given.rounds)
    routes = routing()
    ray.init(address="local", num_cpus=4, namespace="prefvec", log_to_driver=False)
    served = {mode: endpoint(given.size, mode, given.callers, 4) for mode in ("steered", "merged")}
    ray.shutdown()
    step_ms = 48 * 1000 / speed["plain"]
    print(
        json.dumps(
            {
                "steered_throughput_vs_plain": round(speed["steered_48_settings"] / speed["plain"], 3),
                "merged_throughput_vs_plain": round(speed["merged_48_settings"] / speed["plain"], 3),
                "merged_4_settings_vs_plain": round(speed["merged_4_settings"] / speed["plain"], 3),
                "merged_switch_ms": engine["switch_ms"],
                "merged_switch_decode_steps": round(engine["switch_ms"] / step_ms, 2),
                "ttft_ms": {mode: [found["ttft_ms_p50"], found["ttft_ms_p99"]] for mode, found in served.items()},
                "vs_peft_adapter_names": round(speed["steered_48_settings"] / peft, 2),
                "vs_serial": round(speed["steered_48_settings"] / speed["serial_48_settings"], 2),
                "vs_vllm_lora_slots": vllm.get("vs_vllm_lora_slots"),
                "vllm": vllm,
                "replica_ready_s": {mode: found["replica_ready_s"] for mode, found in served.items()},
                "merges_per_request": routes,
                "steered_equal_to_serial": engine["steered_equal_to_serial"],
                "size": given.size,
                "rounds": given.rounds,
                "tokens_per_s": speed | {"peft_adapter_names": round(peft, 1)},
            }
        )
    )


if __name__ == "__main__":
    main()

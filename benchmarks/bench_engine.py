"""The serving engine, every request at its own coefficients, against the same engine without any.

    python benchmarks/bench_engine.py --sizes 10M --rounds 3
    python benchmarks/bench_engine.py --sizes 110M --device cuda

48 requests at once, prompts of 8 to 199 tokens, answers of 16 to 127, greedy, fp32, two vectors of rank 16 on all
linear layers. Seconds are CPU seconds of one thread (on CUDA: wall-clock), prefill and text included; variants take
turns round after round, medians of all rounds. `serial` is the usual way without an engine: merge, `generate`, next.
The last line of stdout is one JSON object; its headline keys are of the largest size.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from merge_models import SIZES, config_of, low_rank_vectors
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.serving.engines.base import Coefficients, OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, Steering, fingerprint

REQUESTS, ROWS, RANK = 48, 48, 16


class Plain(MergedWeights):
    """The engine's floor: the base model, whatever the requests say."""

    def group(self, coefficients: Coefficients) -> Hashable:
        return None

    def apply(self, rows: Sequence[Coefficients]) -> None:
        pass


def requests(settings: int) -> list[Request]:
    """The same prompts and lengths every time, at so many different settings."""
    draw = random.Random(0)
    made = []
    for i in range(REQUESTS):
        prompt = tuple(draw.randrange(8000) for _ in range(draw.randrange(8, 200)))
        eta = 1.0 if settings == 1 else 2 * (i % settings) / (settings - 1) - 1
        coefficients = (("harmless", eta), ("helpful", 0.5))
        sampling = SamplingParams(max_tokens=draw.randrange(16, 128), temperature=0.0)
        made.append(Request(prompt, coefficients, sampling))
    return made


def answers(engine: SlotEngine, asked: list[Request]) -> list[list[int]]:
    pieces: list[list[Any]] = [[] for _ in asked]
    for request, output in zip(asked, pieces, strict=True):
        engine.submit(request, output.append)
    while engine.step():
        pass
    assert all(isinstance(piece, OutputDelta) for output in pieces for piece in output)
    return [[token for piece in output for token in piece.tokens] for output in pieces]


def serial(live: LiveModel, asked: list[Request]) -> list[list[int]]:
    """One request at a time."""
    told = []
    for request in asked:
        live.set_coefficients(dict(request.coefficients))
        ids = torch.tensor([request.prompt], device=live.model.device)
        with torch.inference_mode():
            whole = live.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_tokens, do_sample=False
            )
        told.append(whole[0, len(request.prompt) :].tolist())
    return told


def measure(size: str, rounds: int, device: str) -> dict[str, Any]:
    config = config_of(size)
    config.update({"dtype": "float32", "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval().to(device)
    base = fingerprint(plain)
    vectors = low_rank_vectors(config, base, RANK)
    torch.manual_seed(0)
    live = LiveModel(LlamaForCausalLM(config).eval().to(device), vectors, base_fingerprint=base, threads=1)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    clock = time.perf_counter if device == "cuda" else time.process_time

    def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
        start = clock()
        told = work()
        return sum(map(len, told)) / (clock() - start), told

    speed: dict[str, list[float]] = {}
    with Steering(plain, vectors, base_fingerprint=base) as steering:
        floor = SlotEngine(Plain(live), tokenizer, max_batch=ROWS)
        merged = SlotEngine(MergedWeights(live), tokenizer, max_batch=ROWS)
        steered = SlotEngine(SteeredWeights(steering), tokenizer, max_batch=ROWS)
        variants: dict[str, Callable[[], list[list[int]]]] = {
            "plain": lambda: answers(floor, requests(1)),
            "merged_1_setting": lambda: answers(merged, requests(1)),
            "merged_4_settings": lambda: answers(merged, requests(4)),
            "merged_48_settings": lambda: answers(merged, requests(48)),
            "steered_48_settings": lambda: answers(steered, requests(48)),
            "serial_48_settings": lambda: serial(live, requests(48)),
        }
        told: dict[str, list[list[int]]] = {}
        for _ in range(rounds):
            for name, work in variants.items():
                tokens_per_s, told[name] = timed(work)
                speed.setdefault(name, []).append(tokens_per_s)
                print(f"{size} {name}: {tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
    equal = sum(a == b for a, b in zip(told["steered_48_settings"], told["serial_48_settings"], strict=True))
    return {
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speed.items()},
        "switch_ms": round(statistics.median(switch_ms(live, clock) for _ in range(2 * rounds + 1)), 2),
        "steered_equal_to_serial": f"{equal}/{REQUESTS}",
    }


def switch_ms(live: LiveModel, clock: Callable[[], float]) -> float:
    """Rewriting the weights to other coefficients."""
    start = clock()
    live.set_coefficients({"harmless": random.uniform(-1, 1), "helpful": 0.5})
    if live.model.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {size: measure(size, given.rounds, given.device) for size in given.sizes.split(",")}
    last = results[given.sizes.split(",")[-1]]
    speed = last["tokens_per_s"]
    headline = {
        "steered_throughput_vs_plain": round(speed["steered_48_settings"] / speed["plain"], 3),
        "merged_4_settings_vs_plain": round(speed["merged_4_settings"] / speed["plain"], 3),
        "steered_vs_serial": round(speed["steered_48_settings"] / speed["serial_48_settings"], 2),
        "merged_switch_ms": last["switch_ms"],
    }
    print(json.dumps(headline | {"device": given.device, "rounds": given.rounds, "by_size": results}))


if __name__ == "__main__":
    main()

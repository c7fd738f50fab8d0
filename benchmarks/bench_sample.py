"""Sampling many answers on one CPU thread: `prefvec_ray.evaluation.sample` against `model.generate`, same work.

    python benchmarks/bench_sample.py runs/demo/base

Takes the base model of a finished demo run. CPU seconds of this process, best of the rounds; the last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefvec_ray.evaluation.generate import Sampling, encode, sample_ids
from prefvec_ray.tiny_world import TinyWorld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("--world", default="tiny")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[96, 192, 384, 768])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    asked = [[{"role": "user", "content": prompt.text}] for prompt in TinyWorld(options.world).prompts("report")]
    prompts = encode(tokenizer, asked)
    samples = options.samples

    def ours(batch_size: int) -> int:
        rows = sample_ids(model, tokenizer, prompts, Sampling(samples_per_prompt=samples), batch_size=batch_size)
        return sum(len(row) for answers in rows for row in answers)

    @torch.inference_mode()
    def generate(batch_size: int) -> int:
        order, step, tokens = sorted(prompts, key=len), max(1, batch_size // samples), 0
        for start in range(0, len(order), step):
            batch = tokenizer.pad({"input_ids": order[start : start + step]}, return_tensors="pt", padding_side="left")
            out = model.generate(
                **batch, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=64, num_return_sequences=samples
            )
            tokens += int((out[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
        return tokens

    result: dict[str, float | int] = {"prompts": len(prompts), "samples_per_prompt": samples}
    best: dict[str, float] = {}
    for name, run in (("ours", ours), ("generate", generate)):
        for batch_size in options.batch_sizes:
            seconds, tokens = timed(lambda run=run, size=batch_size: run(size), options.rounds)
            print(f"{name:9s} batch {batch_size:4d}: {seconds:6.2f} CPU s, {tokens / seconds:8.0f} tokens/s")
            best[name] = min(best.get(name, seconds), seconds)
    result |= {f"{name}_cpu_s": round(seconds, 3) for name, seconds in best.items()}
    result["speedup_vs_generate"] = round(best["generate"] / best["ours"], 2)
    print(json.dumps(result))


def timed(run: Callable[[], int], rounds: int) -> tuple[float, float]:
    """Least CPU seconds over the rounds, and the mean number of tokens."""
    seconds, tokens = [], []
    for _ in range(rounds):
        start = time.process_time()
        tokens.append(run())
        seconds.append(time.process_time() - start)
    return min(seconds), statistics.fmean(tokens)


if __name__ == "__main__":
    main()

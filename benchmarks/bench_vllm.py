"""vLLM with every request at its own coefficients, against vLLM without any and against its LoRA slots.

    .venv-vllm/bin/python benchmarks/bench_vllm.py --size 30M --batch 16 --rounds 3     (make env-vllm makes .venv-vllm)

The 48 requests of bench_engine.py, each at a setting of its own, greedy, fp32, one thread, `--batch` of them at a time.
`plain` is vLLM alone, compiled as it comes, and `steered` the same with every request at its own coefficients;
`plain_eager` and `steered_eager` are without compilation. `lora_slots` is the way without steering: each setting an
adapter of its own (the two vectors, scaled, in one of rank 32), 16 of them loaded at a time, never compiled.
Every variant is started once and measured in rounds that take turns; medians of the rounds' ratios. Ratios are of
wall-clock seconds, so the machine should be idle; `by_cpu` has them by the CPU seconds of the processes that compute.
The last line is one JSON object.
"""

import argparse
import asyncio
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
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # as the engine has it on CPUs

SLOTS, REQUESTS, RANK = 16, 48, 16
BATCH = REQUESTS
Variant = Callable[[], dict[int, list[int]]]


def asked(vocabulary: int) -> list[dict[str, Any]]:
    """As `requests(48)` of bench_engine.py."""
    draw, made = random.Random(0), []
    for i in range(REQUESTS):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randrange(8, 200))]
        etas = {"harmless": 2 * i / (REQUESTS - 1) - 1, "helpful": 0.5}
        made.append({"prompt": prompt, "tokens": draw.randrange(16, 128), "etas": etas})
    return made


def plain(base: Path, requests: list[dict[str, Any]], **options: Any) -> Variant:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(base),
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_seqs=BATCH,
        enable_prefix_caching=False,
        **OURS,
        **options,
    )
    loras = options.get("enable_lora") and adapters(base, requests)
    params = [
        SamplingParams(temperature=0, max_tokens=r["tokens"], ignore_eos=True, detokenize=False) for r in requests
    ]

    def run() -> dict[int, list[int]]:
        prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in requests]
        named = {"lora_request": loras} if loras else {}
        told = llm.generate(prompts, params, use_tqdm=False, **named)
        return {number: list(output.outputs[0].token_ids) for number, output in enumerate(told)}

    return run


def adapters(base: Path, requests: list[dict[str, Any]]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    from prefvec_ray.vectors import export_adapter, load_vector

    vectors = {name: load_vector(base.parent / name) for name in ("harmless", "helpful")}
    made = []
    for number, request in enumerate(requests, start=1):
        folder = base.parent / "adapters" / str(number)
        folder.parent.mkdir(exist_ok=True)
        export_adapter(vectors, request["etas"], folder, base_model=str(base))
        made.append(LoRARequest(f"setting-{number}", number, str(folder)))
    return made


def preference(base: Path, requests: list[dict[str, Any]], mode: str, seconds: list[float], **options: Any) -> Variant:
    """`seconds` is told what the last change of the weights took, in merged mode."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from prefvec_ray.serving.config import EngineConfig
    from prefvec_ray.serving.engines.vllm.client import REQUEST, PreferenceClient, RequestRecord
    from prefvec_ray.serving.engines.vllm.options import engine_options, environment
    from prefvec_ray.serving.engines.vllm.section import SECTION
    from prefvec_ray.serving.engines.vllm.shape import SteeringShape
    from prefvec_ray.serving.spending import Spending
    from prefvec_ray.vectors import fingerprint, load_vector

    vectors = {name: load_vector(base.parent / name) for name in ("harmless", "helpful")}
    config = EngineConfig(
        kind="vllm",
        mode=mode,  # type: ignore[arg-type]
        max_batch=BATCH,
        vllm=OURS | {"enable_prefix_caching": False} | options,
    )
    os.environ.update(environment(config, cpu=True))
    arguments = engine_options(base, config)
    del arguments["enable_prompt_tokens_details"]  # of vLLM's server, not of its engine
    if mode == "steered":
        shape = SteeringShape.of(vectors.values(), 2 * RANK)
        arguments["additional_config"] = {SECTION: {"shape": shape.model_dump(mode="json")}}

    async def start() -> tuple[AsyncLLM, PreferenceClient]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(base), **arguments))
        client = PreferenceClient(llm, base, fingerprint(base), config)
        await client.change(vectors)
        return llm, client

    runner = asyncio.Runner()
    llm, client = runner.run(start())

    async def answer(index: int, request: dict[str, Any]) -> list[int]:
        params = SamplingParams(
            max_tokens=request["tokens"],
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={REQUEST: str(index)},
        )
        with client.recorded(str(index), RequestRecord(tuple(sorted(request["etas"].items())), Spending())):
            prompt = {"type": "token", "prompt_token_ids": request["prompt"]}
            (output,) = [each async for each in llm.generate(prompt, params, str(index))]
        return list(output.outputs[0].token_ids)

    async def everything() -> dict[int, list[int]]:
        answers = await asyncio.gather(*(answer(index, request) for index, request in enumerate(requests)))
        return dict(enumerate(answers))

    def run() -> dict[int, list[int]]:
        told = runner.run(everything())
        seconds.append(client.turns.switch_seconds)
        return told

    return run


OURS: dict[str, Any] = {"kv_cache_memory_bytes": 2**30, "max_model_len": 512}


def cpu_seconds() -> float:
    """Of this process and vLLM's workers. Its core is left out: it waits for them in a busy loop."""
    import psutil

    here = psutil.Process()
    working = [p for p in here.children(recursive=True) if "EngineCore" not in p.name()]
    times = [process.cpu_times() for process in (here, *working)]
    return sum(t.user + t.system for t in times)


def one(variant: str, base: Path, rounds: int) -> None:
    """The body of a child process: start the variant, then a round for every line on stdin."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(1)
    requests = asked(min(8000, AutoConfig.from_pretrained(base).vocab_size))
    eager = {"enforce_eager": True}
    switches: list[float] = []
    make: dict[str, Callable[[], Variant]] = {
        "plain": lambda: plain(base, requests),
        "plain_eager": lambda: plain(base, requests, **eager),
        "lora_slots": lambda: plain(base, requests, **eager, enable_lora=True, max_loras=SLOTS, max_lora_rank=2 * RANK),
        "steered": lambda: preference(base, requests, "steered", switches),
        "steered_eager": lambda: preference(base, requests, "steered", switches, **eager),
        "merged": lambda: preference(base, requests, "merged", switches),
    }
    run = make[variant]()
    run()  # warm
    print("ready", flush=True)
    for _ in sys.stdin:
        began, wall = cpu_seconds(), time.perf_counter()
        told = run()
        spent, wall = cpu_seconds() - began, time.perf_counter() - wall
        count = sum(len(tokens) for tokens in told.values())
        print(
            json.dumps({"cpu": spent, "wall": wall, "tokens": count, "answers": told, "switch": (switches or [0])[-1]}),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="30M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=REQUESTS, help="requests that run at a time")
    parser.add_argument("--variants", default="plain,plain_eager,steered,steered_eager,merged,lora_slots")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    global BATCH
    BATCH = given.batch
    if given.one:
        one(given.one, given.base, given.rounds)
        return
    import subprocess

    from serve_world import make_world

    with tempfile.TemporaryDirectory() as folder:
        base, _ = make_world(Path(folder), given.size)
        started: dict[str, Any] = {}
        found: dict[str, list[dict[str, Any]]] = {}
        for variant in given.variants.split(","):
            command = [sys.executable, __file__, "--one", variant, "--base", str(base), "--batch", str(given.batch)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started[variant] = process
            if not _line(process, "ready"):
                raise SystemExit(f"{variant} did not start")
            print(f"{variant} is ready", file=sys.stderr, flush=True)
        for number in range(given.rounds):
            for variant in sorted(started, key=lambda name: (list(started).index(name) + number) % len(started)):
                started[variant].stdin.write("go\n")
                started[variant].stdin.flush()
                found.setdefault(variant, []).append(json.loads(_line(started[variant], "{")))
                time.sleep(2)  # the core goes on looping for a second
        for process in started.values():
            process.stdin.close()
            process.wait(60)
    told = {name: rounds[0]["answers"] for name, rounds in found.items()}
    pairs = {
        "steered_throughput_vs_plain": ("steered", "plain"),
        "steered_eager_throughput_vs_plain_eager": ("steered_eager", "plain_eager"),
        "compiled_throughput_vs_eager_steered": ("steered", "steered_eager"),
        "merged_throughput_vs_plain": ("merged", "plain"),
        "vs_vllm_lora_slots": ("steered", "lora_slots"),
    }

    def ratios(seconds: str) -> dict[str, float]:
        return {
            key: round(statistics.median(b[seconds] / a[seconds] for a, b in zip(found[x], found[y], strict=True)), 3)
            for key, (x, y) in pairs.items()
            if x in found and y in found
        }

    result: dict[str, Any] = ratios("wall") | {"by_cpu": ratios("cpu")}
    for name in ("merged", "lora_slots"):
        if name in told and "steered" in told:
            same = sum(told[name][number] == told["steered"][number] for number in told["steered"])
            result[f"{name}_equal_to_steered"] = f"{same}/{REQUESTS}"
    if "merged" in found:
        result["merged_switch_ms"] = round(1000 * statistics.median(r["switch"] for r in found["merged"]), 1)
    for key, seconds in (("tokens_per_s", "wall"), ("tokens_per_cpu_s", "cpu")):
        result[key] = {n: round(statistics.median(r["tokens"] / r[seconds] for r in f), 1) for n, f in found.items()}
    print(json.dumps(result | {"size": given.size, "batch": given.batch, "rounds": given.rounds, "requests": REQUESTS}))


def _line(process: Any, begins: str) -> str:
    """vLLM prints on stdout as well."""
    for line in process.stdout:
        if line.startswith(begins):
            return str(line)
    return ""


if __name__ == "__main__":
    main()

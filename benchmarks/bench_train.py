"""A DPO run inside Ray Train against the same TRL loop in one process, and against stock TRL: `make bench-train`.

    python benchmarks/bench_train.py --size 10M --rounds 3
    python benchmarks/bench_train.py --size 110M --device cuda --length 512 --batch 8 --only loop,reference

Everything runs with random weights on random text. Peers take turns with ours in the same rounds, each run in a fresh
process; medians of all rounds. Step times come from one and the same callback in every variant. Prints progress on
stderr; the last line of stdout is one JSON object. What the keys mean: docs/bench-train.md.
"""

from __future__ import annotations  # what is sent to Ray's workers must not look for names of this file

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine spinning threads wait for each other
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "PYTHONWARNINGS": "ignore",
}.items():
    os.environ.setdefault(name, value)

HELD_OUT = 8
PREFERENCES = ("harmless", "helpful")
PARTS = ("loop", "reference", "parallel")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What all variants train: a random Llama on random conversations


def write_world(folder: Path, size: str, pairs: int, length: int) -> None:
    """`base/` and, for each preference, `<preference>.jsonl` and `<preference>_test.jsonl`."""
    import torch
    from merge_models import config_of
    from transformers import LlamaForCausalLM

    from prefvec_ray.tiny_world import TinyWorld, build_tokenizer

    tokenizer = build_tokenizer(TinyWorld("micro", 0))
    tokenizer.model_max_length = length
    config = config_of(size)
    config.dtype = "float32"
    config.max_position_embeddings = length
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    words = sorted(tokenizer.get_vocab().values())[300:]  # whole words, no bytes and no special tokens

    def text() -> str:
        return tokenizer.decode(rng.choices(words, k=rng.randint(length // 5, length // 3)))

    for preference in PREFERENCES:
        for name, count in ((preference, pairs), (f"{preference}_test", HELD_OUT)):
            with (folder / f"{name}.jsonl").open("w") as file:
                for _ in range(count):
                    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
                    row = {field: [{"role": role, "content": text()}] for field, role in turns.items()}
                    file.write(json.dumps(row) + "\n")


def training_config(folder: Path, recipe: dict[str, Any], gpu: bool, method: str, **settings: Any) -> Any:
    from prefvec_ray.training import PreferenceData, Resources, TrainingConfig

    return TrainingConfig(
        name="runs",
        output=folder,
        base=folder / "base",
        preferences={
            name: PreferenceData(data=str(folder / f"{name}.jsonl"), test=str(folder / f"{name}_test.jsonl"))
            for name in PREFERENCES
        },
        dpo=recipe,
        method=method,
        resources=Resources(gpus_per_worker=1 if gpu else 0),
        **settings,
    )


def step_clock() -> Any:
    """A TrainerCallback whose `seconds` are those of every step, from the end of the one before it."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.first = self.last = self.mark = 0.0
            self.seconds: list[float] = []

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.time()  # compared with other processes' times

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.first = self.mark = self.now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.last = self.now()
            self.seconds.append(self.last - self.mark)
            self.mark = self.last

    return StepClock()


# One run in a process of its own


def one(job: dict[str, Any]) -> dict[str, Any]:
    """The body of a child process: one variant of one run.

    loop: ours without Ray, watching and checkpoints: pairs tokenized and scored before. reference: the pass that does
    that. stock: TRL's DPOTrainer with a reference model of its own. stock precompute: TRL's, log-probs before training.
    """
    import torch
    from datasets import load_from_disk
    from trl import DPOTrainer

    from prefvec_ray.artifacts.training import Method
    from prefvec_ray.training.dpo import TokenizedDPOTrainer, dpo_config, reference_logps
    from prefvec_ray.training.model import load_model, load_tokenizer

    torch.set_num_threads(1)
    marks = {"imported": time.time()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is not the run's
    before = memory()
    start = time.perf_counter()
    variant, base, clock = job["variant"], job["base"], step_clock()
    with tempfile.TemporaryDirectory() as work_dir:
        if variant == "reference":
            reference_logps(base, load_from_disk(job["pairs"]), job["dpo"], work_dir)
        else:
            kind = TokenizedDPOTrainer if variant == "loop" else DPOTrainer
            args = dpo_config(job["dpo"], work_dir, precompute_ref_log_probs=variant != "stock")
            trainer = kind(
                model=load_model(base, Method(), args),
                args=args,
                train_dataset=load_from_disk(job["scored"] if variant == "loop" else job["pairs"]),
                processing_class=load_tokenizer(base),
                callbacks=[clock],
            )
            trainer.train()
    return {
        **marks,
        "seconds": time.perf_counter() - start,
        "steps": clock.seconds,
        "first": clock.first,
        "last": clock.last,
        "before": before,
        "peak": memory(),
    }


def memory() -> float:
    """Peak MB of this process since its imports: allocated on the GPU, or resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**10


def child(job: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if job["gpu"] else {"CUDA_VISIBLE_DEVICES": ""})
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{job['variant']} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["wall"] = time.time() - started
    return result


# The same run inside Ray Train


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What the plan's worker does, with the clock of the other variants."""
    entered = time.time()
    import transformers

    from prefvec_ray.artifacts.training import RunSpec
    from prefvec_ray.training.dpo import run_dpo
    from prefvec_ray.training.workers import worker_setup

    worker_setup()
    imported = time.time()
    clock = step_clock()
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    spec, board = RunSpec.model_validate(config["spec"]), config["board"]
    with tempfile.TemporaryDirectory() as work_dir:
        run_dpo(spec, lambda values: board.update.remote(spec.label, values), work_dir)
    marks = {"entered": entered, "imported": imported, "first": clock.first, "last": clock.last, "left": time.time()}
    return {**marks, "steps": clock.seconds}


def ray_run(spec: Any, config: Any, board: Any) -> dict[str, Any]:
    from prefvec_ray.training.worker_groups import start_run

    spec = spec.model_copy(update={"out": f"{spec.out}-{time.time_ns()}"})
    started = time.time()
    job = {"spec": spec.model_dump(mode="json"), "board": board}
    run = start_run(ray_worker, job, Path(spec.out).name, config.resources, config.folder / "ray", retries=0)
    result = run.result()
    return {**result, "started": started, "wall": time.time() - started}


# The parts


def bench_loop(specs: dict[str, Any], configs: dict[str, Any], job: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Steps inside Ray Train against the same steps in one process, pair by pair, and what a run costs beside them."""
    from prefvec_ray.training.progress import job_board

    ratios: list[float] = []
    watched: list[float] = []
    rates: list[float] = []
    fixed: dict[str, list[float]] = {}
    for number in range(rounds):
        runs: dict[str, dict[str, Any]] = {}
        order = ["bare", "loop", "default"] if number % 2 else ["default", "loop", "bare"]
        with job_board(configs["bare"].folder) as board:
            for name in order:
                loop = name == "loop"
                runs[name] = child({**job, "variant": "loop"}) if loop else ray_run(specs[name], configs[name], board)
        bare, loop, default = runs["bare"], runs["loop"], runs["default"]
        # The first step pays for warming up, in every variant; equal seeds give equal batches step by step.
        ratios += [ours / theirs for ours, theirs in zip(bare["steps"][1:], loop["steps"][1:], strict=True)]
        watched.append(sum(default["steps"][1:]) / sum(loop["steps"][1:]) - 1)
        rates.append(job["tokens"] / sum(bare["steps"]))
        parts = {
            "all": bare["wall"] - (bare["last"] - bare["first"]),
            "until the worker runs": bare["entered"] - bare["started"],
            "imports": bare["imported"] - bare["entered"],
            "model, data, trainer": bare["first"] - bare["imported"],
            "delta, held-out pairs": bare["left"] - bare["last"],
            "until the result is back": bare["started"] + bare["wall"] - bare["left"],
            "one process, all": loop["wall"] - (loop["last"] - loop["first"]),
        }
        for name, seconds in parts.items():
            fixed.setdefault(name, []).append(seconds)
        say(f"  round {number + 1}: step {statistics.median(bare['steps']):.3f} s, run {bare['wall']:.1f} s")
    costs = {name: round(statistics.median(values), 2) for name, values in fixed.items()}
    say(f"  fixed costs of a run in seconds: {costs}")
    return {
        "ray_overhead_per_step": round(statistics.median(ratios) - 1, 4),
        "watching_overhead": round(statistics.median(watched), 4),
        "fixed_cost_s": costs["all"],
        "fixed_cost_parts_s": costs,
        "tokens_per_s": round(statistics.median(rates), 1),
    }


def bench_reference(job: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of a run, by where its reference log-probs come from. Imports are not counted."""
    found: dict[str, list[dict[str, Any]]] = {}
    variants = ["loop", "reference", "stock", "stock precompute"]
    for number in range(rounds):
        for variant in variants[number % 4 :] + variants[: number % 4]:
            found.setdefault(variant, []).append(child({**job, "variant": variant}))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    peak = {name: statistics.median(run["peak"] for run in runs) for name, runs in found.items()}
    above = {name: statistics.median(run["peak"] - run["before"] for run in runs) for name, runs in found.items()}
    seconds["ours"] = seconds["loop"] + seconds["reference"] / 2  # both polarities share one pass
    say(f"  seconds of a run: { {name: round(value, 2) for name, value in seconds.items()} }")
    say(f"  peak MB: { {name: round(value) for name, value in peak.items()} }")
    del found["reference"]
    rate = {name: job["tokens"] / statistics.median(sum(run["steps"]) for run in runs) for name, runs in found.items()}
    return {
        "reference_saving": {
            "time": round(1 - seconds["ours"] / seconds["stock"], 3),
            "time_against_precompute": round(1 - seconds["ours"] / seconds["stock precompute"], 3),
            "memory": round(1 - above["loop"] / above["stock"], 3),
            "memory_mb": round(peak["stock"] - peak["loop"], 1),
        },
        "run_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_mb": {name: round(value, 1) for name, value in peak.items()},
        "process_tokens_per_s": {name: round(value, 1) for name, value in rate.items()},
    }


def bench_parallel(specs: list[Any], config: Any, rounds: int) -> dict[str, Any]:
    """Four runs as one plan against the same four one after another, start-up included."""
    from prefvec_ray.training.plan import run_plan

    def plan(wanted: list[Any]) -> float:
        for spec in wanted:
            shutil.rmtree(spec.out, ignore_errors=True)
        start = time.perf_counter()
        run_plan(wanted, config.resources, config.folder / "ray")
        return time.perf_counter() - start

    together, alone = [], []
    for _ in range(rounds):
        alone.append(sum(plan([spec]) for spec in specs))
        together.append(plan(specs))
        say(f"  {len(specs)} runs: {alone[-1]:.1f} s one after another, {together[-1]:.1f} s as one plan")
    efficiency = statistics.median(a / (len(specs) * t) for a, t in zip(alone, together, strict=True))
    return {
        "parallel_efficiency": round(efficiency, 3),
        "parallel_speedup": round(efficiency * len(specs), 2),
        "parallel_runs": len(specs),
        "serial_s": round(statistics.median(alone), 1),
        "parallel_s": round(statistics.median(together), 1),
    }


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import ray
    import torch
    from datasets import load_from_disk

    from prefvec_ray.training.dpo import TOKENIZED
    from prefvec_ray.training.train import compute_references, plan_runs, prepare_data

    torch.set_num_threads(1)
    gpu = given.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    write_world(folder, given.size, given.steps * given.batch, given.length)
    recipe = {
        "per_device_train_batch_size": given.batch,
        "per_device_eval_batch_size": HELD_OUT,
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "max_length": given.length,
        "disable_dropout": True,
    }
    common = (folder, recipe, gpu, given.method)
    bare = training_config(*common, watch={"evaluations": 0, "kl_samples": 0}, checkpoint_every=None)
    configs = {"bare": bare, "default": training_config(*common, watch={"kl_tokens": given.length // 3})}
    ray.init(address="local", num_cpus=given.cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    prepared = prepare_data(bare)
    specs = {name: plan_runs(config, compute_references(config, prepared)) for name, config in configs.items()}
    first = specs["bare"][0]
    scored = load_from_disk(first.train[0])
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in scored)
    job = {
        "base": str(folder / "base"),
        "scored": first.train[0],
        "pairs": prepared[first.preference].train,
        "dpo": recipe,
        "gpu": gpu,
        "tokens": tokens,
    }
    assert set(TOKENIZED) <= set(scored.column_names)
    result: dict[str, Any] = {"tokens_a_step": round(tokens / given.steps)}
    if "loop" in given.only:
        say("a run inside Ray Train against the same loop in one process")
        result |= bench_loop({name: plan[0] for name, plan in specs.items()}, configs, job, given.rounds)
    if "parallel" in given.only and (not gpu or torch.cuda.device_count() >= 4):
        say("four runs together against one after another")
        result |= bench_parallel(specs["bare"], bare, max(1, given.rounds // 2))
    ray.shutdown()
    if "reference" in given.only:
        say("reference log-probs once, against stock TRL")
        result |= bench_reference(job, given.rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", help="of the random Llama: 1M, 10M, 110M, 1.1B, 3B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--length", type=int, default=128, help="longest conversation in tokens")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--method", default="full", choices=["full", "lora"], help="of the runs inside Ray Train")
    parser.add_argument("--cpus", type=int, default=4, help="CPUs that the Ray cluster has")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(json.loads(given.one))))
        return
    given.only = given.only.split(",")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        result = measure(given, Path(folder))
    shape = {
        name: getattr(given, name)
        for name in ("size", "method", "cpus", "device", "rounds", "steps", "batch", "length")
    }
    print(json.dumps(result | shape))


if __name__ == "__main__":
    main()

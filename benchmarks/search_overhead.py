"""What a real search on Ray costs beside generating and scoring: time a trial, and memory a process."""

import json
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefvec_ray.evaluation import Sampling
from prefvec_ray.search import SearchConfig, Task, search
from prefvec_ray.vectors import fingerprint, save_vector, vector_from_state

MIB = 2**20


def overhead(task: Task, *, settings: int = 16, actors: int = 2) -> dict[str, Any]:
    """`task`'s prompts and scorer under an untrained model of 10M parameters that talks to the token limit: 256 answers
    of 128 tokens a setting. Then processes of a 60M model with two vectors, weighed."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, namespace="prefvec", log_to_driver=False, logging_level="ERROR")
    folder = Path(tempfile.mkdtemp(prefix="prefvec-search-"))
    try:
        talker = _untrained(task, folder / "talker", hidden=320, layers=6)
        return {
            **_time(_tokens(talker, 128), folder / "search", settings, actors),
            **_memory(_untrained(task, folder / "large", hidden=640, layers=12)),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokens(task: Task, tokens: int) -> Task:
    return replace(task, sampling=task.sampling.model_copy(update={"max_new_tokens": tokens}))


def _time(task: Task, folder: Path, settings: int, actors: int) -> dict[str, Any]:
    began = time.time()
    config = SearchConfig(objectives=["helpful", "harmless"], trials=settings, actors=actors, patience=None)
    search(task, config, folder)
    tried = [row for line in (folder / "trials.jsonl").read_text().splitlines() if "rungs" in (row := json.loads(line))]
    merge = _merge_seconds(task)
    spans: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in tried:
        spans[row["process"]].append(row)
    walls = {p: max(r["ended"] for r in rows) - min(r["began"] for r in rows) for p, rows in spans.items()}
    useful = sum(row["rungs"][-1]["seconds"] - merge * len(row["rungs"]) for row in tried)
    return {
        "trial_overhead": 1 - useful / sum(walls.values()),
        "trial_seconds": useful / len(tried),
        "trial_merge_seconds": merge,
        "trial_processes": len(walls),
        "search_start_seconds": min(row["began"] for row in tried) - began,
    }


def _merge_seconds(task: Task) -> float:
    live = task.evaluator().live
    began = time.perf_counter()
    for i in range(5):
        live.set_coefficients(dict.fromkeys(task.vectors, i / 10))
    return (time.perf_counter() - began) / 5


class _Process:
    """What a trial process holds, and what that weighs."""

    def __init__(self, task: Task) -> None:
        self.schedule = task.fidelity_schedule((1.0,))

    def weigh(self) -> dict[str, float]:
        """Proportional set size in MiB (a page of n processes counts 1/n), in all and of the mapped model files."""
        next(self.schedule.evaluate_rungs({"helpful": 0.5, "harmless": -0.5}))
        total, mapped, path = 0.0, 0.0, ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if not line.split()[0].endswith(":"):
                path = line.split()[-1]
            elif line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
                mapped += int(line.split()[1]) / 1024 if path.endswith(".safetensors") else 0
        return {"pss": total, "mapped": mapped}


def _memory(task: Task) -> dict[str, Any]:
    task = replace(task, prompts=task.prompts[:4], sampling=Sampling(samples_per_prompt=1, max_new_tokens=4))
    kind: Any = ray.remote(num_cpus=1)(_Process)
    actors = [kind.remote(task) for _ in range(3)]
    ray.get([actor.weigh.remote() for actor in actors])
    three = ray.get([actor.weigh.remote() for actor in actors])
    for actor in actors[1:]:
        ray.kill(actor)
    time.sleep(3)
    one = ray.get(actors[0].weigh.remote())
    ray.kill(actors[0])
    files = {
        name: sum(f.stat().st_size for f in path.glob("*.safetensors")) / MIB
        for name, path in {"base": task.base, **task.vectors}.items()
    }
    return {
        "extra_mb_per_trial_process": (sum(weight["pss"] for weight in three) - one["pss"]) / 2,
        "memory": {
            "weights_that_a_process_merges_mb": files["base"],
            "base_and_vectors_on_disk_mb": sum(files.values()),
            "base_and_vectors_mapped_by_three_processes_mb": sum(weight["mapped"] for weight in three),
            "base_and_vectors_mapped_by_one_process_mb": one["mapped"],
        },
    }


def _untrained(task: Task, folder: Path, *, hidden: int, layers: int) -> Task:
    """A random Llama with `task`'s tokenizer, and two random vectors of bf16."""
    torch.manual_seed(0)
    sizes = LlamaConfig.from_pretrained(task.base)
    sizes.update(
        {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "head_dim": 64,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
        }
    )
    model = LlamaForCausalLM(sizes)
    model.save_pretrained(folder / "base")
    for file in task.base.glob("*token*"):
        shutil.copy(file, folder / "base")
    for file in task.base.glob("chat_template*"):
        shutil.copy(file, folder / "base")
    base = fingerprint(folder / "base")
    for name in ("helpful", "harmless"):
        delta = {n: (1e-3 * torch.randn(p.shape)).bfloat16() for n, p in model.named_parameters()}
        save_vector(vector_from_state(delta, preference=name, base_fingerprint=base), folder / name)
    vectors = {name: folder / name for name in ("helpful", "harmless")}
    return replace(task, base=folder / "base", vectors=vectors, base_fingerprint=base)

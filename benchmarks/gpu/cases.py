"""What the GPU benchmarks share: cases that resume, one JSON line each, clocks, and the models.

Every script takes `--out FILE` (JSON lines; a case that the file holds is not run again), `--budget SECONDS` (no case
begins after that; default 360), `--sizes`, and `--rounds`. They need torch, transformers and the packages of
`docs/gpu.md`, but not Ray, TRL or vLLM.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from merge_models import SIZES, config_of
from transformers import LlamaForCausalLM, PreTrainedModel

from prefvec_ray.vectors import LowRank, PreferenceVector, VectorInfo, checkpoint_state

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]
BASE = "random weights"
"""The fingerprint of every model here: nothing is hashed."""


def parser(text: str | None, sizes: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--sizes", nargs="+", default=sizes.split(), choices=sorted(SIZES))
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--rounds", type=int, default=20, help="measurements, of which the median counts")
    found.add_argument("--out", type=Path, default=Path("bench-results/gpu.jsonl"))
    found.add_argument("--budget", type=float, default=360, help="seconds after which no case begins")
    return found


def machine(device: str) -> Result:
    """The device and the versions, as every line states them."""
    import transformers

    found = {"device": platform.processor() or platform.machine(), "driver": None}
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        found = {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else None}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    return found | versions | {"python": platform.python_version()}


def run_cases(bench: str, given: argparse.Namespace, cases: dict[str, Callable[[], Result]]) -> None:
    """Run the cases that `--out` does not hold yet, in order, and append a line for each.

    A case that does not fit into memory is a line that says so. Any other error is a line as well, is tried again by
    the next call, and ends this one with exit code 1 once the other cases have run. What is left when the budget is
    spent is named, and the same command continues: exit code 75, as of `prefvec robustness study --budget`.
    """
    started, about = time.monotonic(), machine(given.device)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    sound = [line for line in map(json.loads, lines) if "traceback" not in line]
    done = {(line["bench"], line["case"]) for line in sound if line["device"] == about["device"]}
    failed = False
    left = [name for name in cases if (bench, name) not in done]
    while left and time.monotonic() - started < given.budget:
        name = left.pop(0)
        begun = time.monotonic()
        try:
            result = cases[name]()
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        except Exception as error:  # what a strange machine says must not cost the cases after it
            result = {"error": repr(error), "traceback": traceback.format_exc()}
            failed = True
        line = {"bench": bench, "case": name} | result | {"seconds": round(time.monotonic() - begun, 1)} | about
        with given.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        if given.device == "cuda":
            torch.cuda.empty_cache()
    if left:
        print(f"{bench}: {len(left)} cases left: {', '.join(left)}; the same command continues", file=sys.stderr)
        sys.exit(75)
    sys.exit(1 if failed else 0)


def median_seconds(work: Callable[[], object], device: str, rounds: int, warm: int = 3) -> float:
    """The median over `rounds` calls: of CUDA events on a GPU, else of wall-clock time."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def random_llama(size: str, device: str) -> PreTrainedModel:
    """A Llama of this size with random weights in bf16, built where it runs. Two of one size are equal."""
    config = config_of(size)
    config.update({"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def low_rank_pair(model: PreTrainedModel, rank: int) -> dict[str, PreferenceVector]:
    """Two vectors of this rank on all seven projections of every layer, in bf16, on the model's device."""
    vectors = {}
    for seed, preference in enumerate(("harmless", "helpful")):
        torch.manual_seed(seed)
        entries = {}
        for name, tensor in checkpoint_state(model).items():
            if name.split(".")[-2].endswith("_proj"):
                like = {"dtype": tensor.dtype, "device": tensor.device}
                a_ri, b_or = torch.randn(rank, tensor.shape[1], **like), torch.randn(tensor.shape[0], rank, **like)
                entries[name] = LowRank(a_ri * 0.02, b_or * 0.02)
        vectors[preference] = PreferenceVector(information(preference, "low-rank"), entries)
    return vectors


def information(preference: str, form: str) -> VectorInfo:
    return VectorInfo(preference=preference, form=form, dtype="bfloat16", base_fingerprint=BASE)


def without_front_door(package: str) -> None:
    """Let modules below `package` be imported without running its `__init__`, which asks for Ray."""
    if package not in sys.modules:
        bare = types.ModuleType(package)
        bare.__path__ = [str(ROOT / package.replace(".", "/"))]
        sys.modules[package] = bare

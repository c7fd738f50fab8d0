"""Re-merge, export, extraction and steering against the machine's limits and the usual ways: `make bench-merge`.

    python benchmarks/bench_merge.py --sizes 10M,110M,1.1B --rounds 5
    python benchmarks/bench_merge.py --sizes 110M --only remerge,steer --device cuda

Everything is measured in one process, variants in turn round after round, medians of all rounds. Headline keys are of
the largest size. Files: inputs are in the page cache (read once before); before each timed section `sync` leaves no
dirty pages; each section writes a new folder and ends when every file in it is synced, for `cp` as for the others.
Prints progress on stderr; the last line of stdout is one JSON object.
"""

import argparse
import copy
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine spinning threads wait for each other

import torch
import yaml
from merge_models import SIZES, config_of, low_rank_vectors, write_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prefvec_ray.vectors import (
    Checkpoint,
    LiveModel,
    PreferenceVector,
    Steering,
    checkpoint_state,
    export_adapter,
    export_model,
    extract_from_checkpoints,
    fingerprint,
    load_vector,
)
from prefvec_ray.vectors._native import compile_library, merge_library

HERE = Path(__file__).parent
ETAS = {"harmless": 0.7, "helpful": 0.5}
KEYS = ["remerge_fraction_of_triad", "remerge_speedup_vs_naive", "export_over_copy", "export_speedup_vs_mergekit"]
KEYS += ["export_peak_anon_mb", "extract_over_copy", "steer_overhead_b1", "steer_overhead_b8", "steer_overhead_b32"]
KEYS += ["steer_speedup_vs_peft_b8"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounds_of(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant. Each round runs all of them, starting with another one; round 0 warms up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = variants[name]()
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Re-merge in memory


def bench_remerge(folder: Path, size: str, rounds: int, device: str, threads: int) -> dict[str, Any]:
    """Two bf16 vectors onto a bf16 model: useful bytes (base + 2 vectors read, model written) against triad's."""
    base = Checkpoint(folder / "base")
    known = fingerprint(base)
    vectors = {name: load_vector(folder / f"phi-{name}") for name in ETAS}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).to(device)
    mapped = base if device == "cpu" else None  # on a device the base is a second buffer there
    options: dict[str, Any] = {"base": mapped, "base_fingerprint": known, "threads": threads}
    live = LiveModel(model, vectors, **options)
    plain = LiveModel(model, vectors, **options, native=False) if merge_library() is not None else live
    state, pristine = checkpoint_state(model), {name: base[name].to(device) for name in base}
    phis = {key: {name: v.entry(name).values.to(device) for name in v.names()} for key, v in vectors.items()}

    def naive() -> None:
        """What one writes first: parameter by parameter in fp32."""
        for name, parameter in state.items():
            total = pristine[name].float()
            for key, eta in ETAS.items():
                if name in phis[key]:
                    total = total + eta * phis[key][name].float()
            parameter.copy_(total.to(parameter.dtype))

    def chain() -> None:
        """torch.add in bf16: three roundings instead of one."""
        for name, parameter in state.items():
            parameter.copy_(pristine[name])
            for key, eta in ETAS.items():
                if name in phis[key]:
                    parameter.add_(phis[key][name], alpha=eta)

    floats = min(sum(tensor.nbytes for tensor in state.values()) // 4, 1 << 27)  # at most 0.5 GB an array
    triad = triad_of(floats, device, threads)
    variants = {
        "ours": lambda: timed(lambda: live.set_coefficients(ETAS), device),
        "ours, torch path": lambda: timed(lambda: plain.set_coefficients(ETAS), device),
        "naive fp32": lambda: timed(naive, device),
        "bf16 add chain": lambda: timed(chain, device),
        "triad": lambda: timed(triad, device),
    }
    seconds = rounds_of(variants, rounds)
    useful = sum(4 * tensor.nbytes for tensor in state.values())
    limit = 12 * floats / seconds["triad"]
    speeds = {name: useful / value / 1e9 for name, value in seconds.items()} | {"triad": limit / 1e9}
    say(f"  re-merge GB/s: {', '.join(f'{name} {speed:.1f}' for name, speed in speeds.items())}")
    return {
        "remerge_fraction_of_triad": useful / seconds["ours"] / limit,
        "remerge_torch_path_fraction_of_triad": useful / seconds["ours, torch path"] / limit,
        "remerge_speedup_vs_naive": seconds["naive fp32"] / seconds["ours"],
        "remerge_speedup_vs_bf16_chain": seconds["bf16 add chain"] / seconds["ours"],
        "remerge_gb_per_s": speeds,
    }


def triad_of(floats: int, device: str, threads: int) -> Callable[[], object]:
    """a = b + s c over fp32 arrays: compiled with non-temporal stores on CPU, one kernel on CUDA."""
    a, b, c = (torch.full((floats,), value, device=device) for value in (0.0, 1.0, 2.0))
    if device == "cuda":
        return lambda: torch.add(b, c, alpha=3.0, out=a)
    library = compile_library(HERE / "triad.cpp")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c)]

    def triad(_kept: tuple[Tensor, ...] = (a, b, c)) -> None:
        library.triad(*pointers, ctypes.c_float(3.0), ctypes.c_int64(floats), ctypes.c_int32(threads))

    return triad


# Files


def bench_extract(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """phi of two bf16 checkpoints, hashes of all three folders included, against cp of the vector written."""
    sample = folder / "phi-helpful"
    out = folder / "out"

    known = load_vector(sample).info
    parents = {"positive": fingerprint(folder / "helpful"), "negative": fingerprint(folder / "harmless")}

    def extract(**options: Any) -> None:
        sources = (folder / "helpful", folder / "harmless", out)
        extract_from_checkpoints(*sources, base_folder=folder / "base", preference="x", threads=threads, **options)

    told = partial(extract, base_fingerprint=known.base_fingerprint, parents=parents)
    works = {"ours": extract, "ours, fingerprints known": told, "cp": copier(sample, out)}
    seconds = rounds_of({name: partial(written, work, out) for name, work in works.items()}, rounds)
    say(f"  extract: {', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}")
    return {
        "extract_over_copy": seconds["ours"] / seconds["cp"],
        "extract_over_copy_fingerprints_known": seconds["ours, fingerprints known"] / seconds["cp"],
        "extract_seconds": seconds["ours"],
    }


def bench_export(folder: Path, rounds: int, threads: int, mergekit: Path | None) -> dict[str, Any]:
    """base + 2 vectors to a checkpoint of five shards, the base's fingerprint checked, against cp and mergekit."""
    vectors = {name: load_vector(folder / f"phi-{name}") for name in ETAS}
    shard = sum(file.stat().st_size for file in (folder / "base").glob("model*.safetensors")) // 5 + (1 << 20)
    sample, out = folder / "exported", folder / "out"
    shutil.rmtree(sample, ignore_errors=True)
    export_model(folder / "base", vectors, ETAS, sample, max_shard_size=shard)

    def export() -> None:
        export_model(folder / "base", vectors, ETAS, out, max_shard_size=shard, threads=threads)

    variants = {"ours": lambda: written(export, out), "cp": lambda: written(copier(sample, out), out)}
    if mergekit is not None:
        config = folder / "mergekit.yaml"
        models = [{"model": str(folder / name), "parameters": {"weight": eta}} for name, eta in ETAS.items()]
        merge = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
        merge |= {"dtype": "bfloat16", "parameters": {"normalize": False}}
        config.write_text(yaml.safe_dump(merge), "utf-8")
        variants["mergekit"] = lambda: mergekit_run(mergekit, config, out, threads)
    seconds = rounds_of(variants, rounds)
    say(f"  export: {', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}")
    result: dict[str, Any] = {
        "export_over_copy": seconds["ours"] / seconds["cp"],
        "export_seconds": seconds["ours"],
        "export_peak_anon_mb": peak_of_export(folder, shard, threads),
    }
    if mergekit is not None:
        result["export_speedup_vs_mergekit"] = seconds["mergekit"] / seconds["ours"]
        mergekit_run(mergekit, config, out, threads, keep=True)
        result["mergekit_difference"] = differences(folder, sample, out)
        shutil.rmtree(out)
    return result


def copier(source: Path, out: Path) -> Callable[[], object]:
    return lambda: subprocess.run(["cp", "-r", str(source), str(out)], check=True)


def written(work: Callable[[], object], out: Path) -> float:
    """Seconds until `work` has written `out` and every file in it is on disk; `out` is removed again, untimed."""
    os.sync()
    start = time.perf_counter()
    work()
    for path in [*out.iterdir(), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


PEAK = """
import sys, threading, time
import torch
from prefvec_ray.vectors import export_model, load_vector
torch.set_num_threads(int(sys.argv[3]))
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
peak, done = anonymous(), threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
before, folder = anonymous(), sys.argv[1]
vectors = {name: load_vector(f"{folder}/phi-{name}") for name in ("harmless", "helpful")}
etas = {"harmless": 0.7, "helpful": 0.5}
export_model(f"{folder}/base", vectors, etas, f"{folder}/peak", max_shard_size=int(sys.argv[2]))
done.set()
watcher.join()
print(before, peak)
"""


def peak_of_export(folder: Path, shard: int, threads: int) -> float:
    """Peak anonymous memory of a fresh process that exports, interpreter and torch included (MB)."""
    command = [sys.executable, "-c", PEAK, str(folder), str(shard), str(threads)]
    before, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    shutil.rmtree(folder / "peak")
    say(f"  export: peak anonymous memory {peak:.0f} MB, {before:.0f} MB of it before it began (torch, imports)")
    return peak


# mergekit


def mergekit_python(cache: Path) -> Path:
    """The interpreter of mergekit's own environment, made on first use. Raises CalledProcessError where that fails."""
    requirements = HERE / "requirements-mergekit.txt"
    folder = cache / "mergekit-venv"
    python = folder / "bin" / "python"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        say("  making an environment for mergekit (minutes, once)")
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        shutil.copyfile(requirements, stamp)
    return python


def mergekit_run(python: Path, config: Path, out: Path, threads: int, *, keep: bool = False) -> float:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [str(python), str(HERE / "mergekit_peer.py"), str(config), str(out), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    if not keep:
        shutil.rmtree(out)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def differences(folder: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """Share of weights that are not the float64 sum's rounding, and error of the applied update, for both."""
    base, a, b = Checkpoint(folder / "base"), Checkpoint(ours), Checkpoint(theirs)
    models = {name: Checkpoint(folder / name) for name in ETAS}
    phis = {name: load_vector(folder / f"phi-{name}") for name in ETAS}
    wrong, error, count, energy = {"ours": 0, "mergekit": 0}, {"ours": 0.0, "mergekit": 0.0}, 0, 0.0
    for name in base.names()[:: max(1, len(base) // 24)]:
        start = base[name].double()
        exact = start + sum(eta * (models[m][name].double() - start) for m, eta in ETAS.items())
        stored = start + sum(eta * phis[m].dense(name).double() for m, eta in ETAS.items())
        count += exact.numel()
        energy += (exact - base[name]).square().sum().item()
        for key, merged, target in (("ours", a[name], stored), ("mergekit", b[name], exact)):
            wrong[key] += int((merged != target.to(merged.dtype)).sum())
            error[key] += (merged.double() - exact).square().sum().item()
    result = {f"{key}_misrounded": wrong[key] / count for key in wrong}
    return result | {f"{key}_update_error": (error[key] / energy) ** 0.5 for key in error}


# Steering


def bench_steering(folder: Path, rounds: int, device: str, size: str = "110M", rank: int = 32) -> dict[str, Any]:
    """A decode step, each row with its own coefficients: 2 vectors of rank 32, all projections, fp32 (CUDA: bf16)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(size)).to(dtype).eval().to(device)
    known = fingerprint(model)
    vectors = low_rank_vectors(model.config, known, rank)
    result: dict[str, Any] = {}
    for batch in (1, 8, 32):
        rows = [{"helpful": 1 - i / batch, "harmless": i / batch - 0.5} for i in range(batch)]

        def steered(rows: list[dict[str, float]] = rows, batch: int = batch) -> float:
            with Steering(model, vectors, base_fingerprint=known) as steering:
                steering.set_coefficients(rows)
                return decode_step(model, batch, device)

        plain = {f"plain {i}": lambda batch=batch: decode_step(model, batch, device) for i in range(2)}
        variants: dict[str, Callable[[], float]] = {**plain, "steered": steered}
        if batch == 8:
            peer, names = peft_peer(model, vectors, rows, folder / "adapters")
            with Steering(model, vectors, base_fingerprint=known) as steering:
                steering.set_coefficients(rows)
                tokens = torch.arange(8, device=device).view(8, 1)
                with torch.inference_mode():
                    apart = (model(tokens).logits - peer(tokens, adapter_names=names).logits).abs().max().item()
            result["steer_logits_apart_from_peft"] = apart
            variants["peft"] = partial(decode_step, peer, 8, device, adapter_names=names)
        seconds = rounds_of(variants, rounds)
        say(f"  decode step, batch {batch}: {', '.join(f'{n} {s * 1e3:.1f} ms' for n, s in seconds.items())}")
        result[f"steer_overhead_b{batch}"] = seconds["steered"] / seconds["plain 0"] - 1
        result[f"steer_control_b{batch}"] = seconds["plain 1"] / seconds["plain 0"] - 1
        if batch == 8:
            result["steer_speedup_vs_peft_b8"] = seconds["peft"] / seconds["steered"]
    return result


@torch.inference_mode()
def decode_step(model: nn.Module, batch: int, device: str, steps: int = 8, **options: Any) -> float:
    """Median seconds of one token for every row, after a prompt of 16."""
    prompt = torch.randint(1, 1000, (batch, 16), device=device)
    cache = model(prompt, use_cache=True, **options).past_key_values
    token, times = prompt[:, :1], []
    for _ in range(steps):
        call = lambda: model(token, past_key_values=cache, use_cache=True, **options)  # noqa: E731
        times.append(timed(call, device))
    return statistics.median(times)


def peft_peer(
    model: nn.Module, vectors: Mapping[str, PreferenceVector], rows: list[dict[str, float]], folder: Path
) -> tuple[nn.Module, list[str]]:
    """The same function in PEFT: one adapter per row (rank 64 holds both vectors), over the same weights."""
    from peft import PeftModel

    twin = copy.deepcopy(model)
    for own, shared in zip(twin.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    shutil.rmtree(folder, ignore_errors=True)
    names = [f"row{number}" for number in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        export_adapter(vectors, row, folder / name)
    peer = PeftModel.from_pretrained(twin, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        peer.load_adapter(folder / name, adapter_name=name)
    return peer.eval(), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10M,110M,1.1B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="remerge,extract,export,steer", help="parts to run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for re-merge and steering")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder for models (default: a temporary one); 8x the largest model")
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts, notes = set(options.only.split(",")), {}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefvec-ray"
    mergekit = None
    if "export" in parts and options.no_mergekit:
        notes["export_speedup_vs_mergekit"] = "--no-mergekit"
    elif "export" in parts:
        try:
            mergekit = mergekit_python(cache)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            notes["export_speedup_vs_mergekit"] = f"mergekit could not be installed: {reason}"
    sizes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-merge-") as temporary:
        for size in options.sizes.split(",") if parts - {"steer"} else []:
            folder, results = Path(temporary) / size, sizes.setdefault(size, {})
            say(f"{size}: writing models")
            write_models(folder, size)
            for name in ETAS:
                sources = (folder / name, folder / "base", folder / f"phi-{name}")
                extract_from_checkpoints(*sources, base_folder=folder / "base", preference=name)
            if "remerge" in parts:
                results |= bench_remerge(folder, size, options.rounds, options.device, options.threads)
            if "extract" in parts:
                results |= bench_extract(folder, options.rounds, options.threads)
            if "export" in parts:
                results |= bench_export(folder, options.rounds, options.threads, mergekit)
            shutil.rmtree(folder)
        steering = bench_steering(Path(temporary), options.rounds, options.device) if "steer" in parts else {}
    headline = {key: value for results in sizes.values() for key, value in results.items()} | steering
    machine = {"cpu": cpu_name(), "threads": options.threads, "compiled": merge_library() is not None}
    if options.device == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    summary = {key: headline.get(key) for key in KEYS}
    summary |= {"sizes": sizes, "steering": steering, "rounds": options.rounds, "machine": machine, "notes": notes}
    print(json.dumps(rounded(summary)))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

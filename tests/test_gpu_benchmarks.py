"""The benchmarks for a GPU, each at toy size on the CPU, in a Python that has neither Ray nor TRL nor vLLM."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOY = {
    "remerge": [],
    "steer": ["--batches", "2", "--tokens", "16", "--backend", "eager"],
    "engine": ["--batches", "2"],
    "dpo": ["--pairs", "2", "--length", "32"],
}
RUN = """
import json, runpy, sys
from importlib.machinery import PathFinder


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "trl", "vllm"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Bare)
import torch

torch.set_num_threads(1)
folder, out, scripts, study = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
sys.path.insert(0, folder)
codes = [0]
for name, options in scripts.items():
    sys.argv = [name, "--sizes", "1M", "--device", "cpu", "--rounds", "1", "--out", out, *options]
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
if study:
    from prefvec_ray.cli import main

    main(["robustness", "study", *study])
sys.exit(max(codes))
"""


def run(out, scripts, study=()):
    folder = str(ROOT / "benchmarks" / "gpu")
    arguments = [sys.executable, "-c", RUN, folder, str(out), json.dumps(scripts), json.dumps(study)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=out.parent)


def test_every_script_runs_without_ray_and_says_where_it_ran(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = run(out, TOY)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["bench"] for line in lines} == set(TOY)
    for line in lines:
        assert line["device"]
        assert {"driver", "torch", "cuda", "transformers", "python"} <= set(line)
    found = {(line["bench"], line["case"]): line for line in lines}
    assert found["remerge", "1M remerge k=2"]["gb_per_s"] > 0
    assert found["steer", "1M compiled batch 2"]["apart"] < 0.01, "compiled, steering computes the same"
    assert found["engine", "1M steered rows 2"]["tokens"] == found["engine", "1M plain rows 2"]["tokens"]
    tiles, logits = (found["dpo", f"1M {way} pairs 2"]["loss"] for way in ("tiles", "logits"))
    assert abs(tiles - logits) < 0.02
    kept = out.read_bytes()
    assert run(out, {"remerge": []}).returncode == 0
    assert out.read_bytes() == kept, "what is measured is not measured again"


def test_a_budget_leaves_cases_and_a_slice_of_the_study_needs_no_ray(tmp_path):
    left = run(tmp_path / "gpu.jsonl", {"dpo": ["--pairs", "3", "--length", "16", "--budget", "0"]})
    assert left.returncode == 75
    assert "2 cases left: 1M tiles pairs 3, 1M logits pairs 3; the same command continues" in left.stderr
    done = run(tmp_path / "gpu.jsonl", {}, ["--preset", "quick", "--budget", "0.01s"])
    assert done.returncode == 75, done.stderr
    assert "4 of 4 left; the same command continues" in done.stdout

"""Train one LoRA run beside a base as it is, one beside the same rounded to nf4, and one rounded to int8.

Run by test_quantized.py with bitsandbytes on its path.
"""

import sys
import tempfile
from pathlib import Path

import torch

from prefvec_ray.artifacts.training import Method, Quantization, RunSpec, Watch
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.references import ReferenceJob, ScoringTask, write_references
from prefvec_ray.vectors import fingerprint

RECIPE = {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 1, "bf16": False}


def main(base: str, pairs: str, out: Path) -> None:
    ways: dict[str, Quantization | None] = {"plain": None, "nf4": "nf4", "int8": "int8"}
    for name, quantize in ways.items():
        method = Method(kind="lora", lora={"r": 4, "lora_alpha": 8}, quantize=quantize)
        tasks = [
            ScoringTask(target=str(out / name / "train"), source=pairs, pairs=32),
            ScoringTask(
                target=str(out / name / "answers"), source=str(out / name / "train"), pairs=8, samples=4, tokens=8
            ),
        ]
        job = ReferenceJob(base=base, dpo=RECIPE, method=method, tasks=tasks)
        write_references(job, lambda done, total: None)
        spec = RunSpec(
            key=name,
            preference="helpful",
            polarity="positive",
            seed=0,
            base=base,
            base_fingerprint=fingerprint(base),
            data_digest="none",
            train=[tasks[0].target],
            test={"helpful": tasks[0].target},
            answers=[tasks[1].target],
            dpo=RECIPE,
            method=method,
            out=str(out / name / "run"),
            watch=Watch(evaluations=0),
        )
        with tempfile.TemporaryDirectory() as work_dir:
            run_dpo(spec, lambda values: None, work_dir)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""Train one LoRA run beside a base as it is, one beside the same rounded to nf4, and one rounded to int8; steer both
rounded bases with what was trained beside them.

Run by test_quantized.py with bitsandbytes on its path.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from prefvec_ray.artifacts.training import Method, Quantization, RunSpec, Watch
from prefvec_ray.training.dpo import run_dpo
from prefvec_ray.training.model import load_base
from prefvec_ray.training.quantized import quantized_loading
from prefvec_ray.training.references import ReferenceJob, ScoringTask, write_references
from prefvec_ray.vectors import Steering, fingerprint, load_vector

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
        if quantize is not None:
            steer(base, quantize, Path(spec.out) / "delta", out / name / "steered.json")


def steer(base: str, quantize: Quantization, vector: Path, out: Path) -> None:
    """The vector beside the rounded base and beside the base as it is, row by row: distances between log-probs."""
    phi = load_vector(vector)
    rounded = load_base(base, **quantized_loading(quantize, torch.float32))
    exact = load_base(base)
    ids = torch.randint(0, exact.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    etas = [0.0, 1.0, -2.0]

    def log_probs(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)

    def steered(model: torch.nn.Module) -> torch.Tensor:
        with Steering(model, {"helpful": phi}, base_fingerprint=phi.info.base_fingerprint) as steering:
            steering.set_coefficients([{"helpful": eta} for eta in etas])
            return log_probs(model)

    def beside(eta: float) -> torch.Tensor:
        """eta phi x added to each rounded layer's output, one layer at a time: what steering has to equal."""

        def change(name: str) -> Any:
            phi_OI = phi.dense(name)
            layer = rounded.get_submodule(name.removesuffix(".weight"))
            return layer.register_forward_hook(lambda _, args, y: y + eta * torch.nn.functional.linear(args[0], phi_OI))

        changes = [change(name) for name in phi.names()]
        try:
            return log_probs(rounded)
        finally:
            for hook in changes:
                hook.remove()

    on_rounded, on_exact = steered(rounded), steered(exact)  # first: bitsandbytes packs weights anew in the first pass
    plain_rounded, plain_exact = log_probs(rounded), log_probs(exact)
    expected = torch.stack([beside(eta)[row] for row, eta in enumerate(etas)])

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    found = {
        "base untouched": bool(torch.equal(on_rounded[0], plain_rounded[0])),
        "to expected": distance(on_rounded, expected),
        "moved": [distance(on_rounded[row], plain_rounded[row]) for row in range(3)],
        "rounding": distance(plain_rounded, plain_exact),
        "effect on both": distance(on_rounded - plain_rounded, on_exact - plain_exact),
        "effect": distance(on_exact, plain_exact),
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

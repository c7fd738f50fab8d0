"""One DPO run (Rafailov et al., arXiv 2305.18290) around TRL's DPOTrainer: tokenized pairs in, an fp32 delta out.

No Ray in here: `run_dpo` and `reference_logps` work in one process, and as the body of every Ray Train worker.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from pydantic import Field
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from prefvec_ray.config import Config
from prefvec_ray.preferences import flip
from prefvec_ray.vectors import checkpoint_state, save_vector, vector_from_state

Polarity = Literal["positive", "negative"]
SIGN: dict[Polarity, str] = {"positive": "+", "negative": "-"}
TOKENIZED = ["prompt_ids", "chosen_ids", "rejected_ids"]
REFERENCE = ["ref_chosen_logps", "ref_rejected_logps"]

Report = Callable[[dict[str, Any]], None]


class RunSpec(Config):
    """One DPO run, complete: equal specs give equal deltas, and `key` names the result on disk."""

    key: str
    preference: str
    polarity: Polarity
    seed: int
    base: str
    base_fingerprint: str
    data_digest: str
    train: list[str]
    """Folders of reference datasets; several are mixed in equal shares, as many pairs in all as the largest has."""
    test: dict[str, str] = Field(min_length=1)
    """Held-out pairs by preference, never flipped."""
    dpo: dict[str, Any] = {}
    out: str
    """Folder that appears, complete, when the run has finished."""

    @property
    def name(self) -> str:
        """`helpful+`, `helpful-`, `mixed+`."""
        return self.preference + SIGN[self.polarity]

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes pairs already tokenized and scored by the reference model as they are.

    The stock trainer would tokenize them again and refuse the reference columns as duplicates.
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if set(TOKENIZED) <= set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)


def load_base(base: str | Path) -> PreTrainedModel:
    """The base model with fp32 master weights, whatever it is stored in: phi must not be rounded as it forms."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dpo_config(recipe: dict[str, Any], output_dir: str | Path, *, seed: int = 0, **overrides: Any) -> DPOConfig:
    """The user's recipe over defaults that hold on CPU and GPU alike, with what the plan owns on top."""
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": gpu,
        "activation_checkpointing": False,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 0.05,
        "lr_scheduler_type": "cosine",
    }
    owned = {
        "output_dir": str(output_dir),
        "seed": seed,
        "precompute_ref_log_probs": True,
        "save_strategy": "no",
    }
    return DPOConfig(**{**defaults, **recipe, **owned, **overrides})


def reference_logps(base: str, pairs: Dataset, recipe: dict[str, Any], work_dir: str | Path) -> Dataset:
    """Tokenize `pairs` and add the base model's summed log-probability of each answer (DPO, eq. 7: pi_ref).

    Args:
        pairs: columns prompt, chosen, rejected, plain or conversational.

    Returns:
        One row a pair: TOKENIZED and REFERENCE columns. On several workers every rank returns the whole of it.
    """
    trainer = TokenizedDPOTrainer(
        model=load_base(base),
        args=dpo_config(recipe, work_dir),
        train_dataset=pairs,
        processing_class=load_tokenizer(base),
    )
    return trainer.train_dataset.select_columns(TOKENIZED + REFERENCE)


def mix_equally(parts: list[Dataset], seed: int) -> Dataset:
    """An equal share of each part, shuffled, as many rows in all as the largest part has.

    So a run on mixed data takes as many steps as a run on one preference, and step length is no hidden advantage.
    """
    if len(parts) == 1:
        return parts[0]
    share = max(len(part) for part in parts) // len(parts)
    picked = [part.shuffle(seed=seed).select(range(min(share, len(part)))) for part in parts]
    return concatenate_datasets(picked).shuffle(seed=seed)


def run_dpo(spec: RunSpec, report: Report, work_dir: str | Path) -> dict[str, Any] | None:
    """Train one run and write its folder: `delta/` (theta_run - theta_base in fp32, vector file format) and `run.json`.

    `report` gets {"step", "total", "loss", "accuracy"} as training goes on. Every rank calls this; rank 0 writes and
    returns the content of run.json, the others return None.

    Raises:
        FloatingPointError: the loss or a parameter became NaN or infinite; nothing is written.
    """
    started = time.perf_counter()
    train = mix_equally([load_from_disk(folder) for folder in spec.train], spec.seed)
    if spec.polarity == "negative":
        train = flip(train)
    model = load_base(spec.base)
    trainer = TokenizedDPOTrainer(
        model=model,
        args=dpo_config(spec.dpo, work_dir, seed=spec.seed),
        train_dataset=train,
        eval_dataset={name: load_from_disk(folder) for name, folder in spec.test.items()},
        processing_class=load_tokenizer(spec.base),
        callbacks=[_Reporter(report)],
    )
    trainer.remove_callback(PrinterCallback)  # the report says it better
    trainer.train()
    held_out = {name: trainer.evaluate(name, metric_key_prefix=f"eval_{name}") for name in spec.test}
    if not trainer.is_world_process_zero():
        return None

    result = {
        "spec": spec.model_dump(),
        "steps": trainer.state.global_step,
        "pairs": len(train),
        "seconds": round(time.perf_counter() - started, 2),
        "history": [
            {
                "step": log["step"],
                "loss": log["loss"],
                "accuracy": log["rewards/accuracies"],
                "margin": log["rewards/margins"],
            }
            for log in trainer.state.log_history
            if "loss" in log
        ],
        "held_out": {
            name: {
                "accuracy": metrics["eval_rewards/accuracies"],
                "margin": metrics["eval_rewards/margins"],
                "loss": metrics[f"eval_{name}_loss"],
                "pairs": len(trainer.eval_dataset[name]),
            }
            for name, metrics in held_out.items()
        },
    }
    _write_run(spec, _delta(model, load_base(spec.base)), result)
    return result


def _delta(trained: PreTrainedModel, base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """theta_run - theta_base in fp32 under the checkpoint's parameter names; tied weights appear once, unchanged
    parameters not at all."""
    pristine = checkpoint_state(base)
    delta = {}
    for name, parameter in checkpoint_state(trained).items():
        change = parameter.detach().cpu().float() - pristine[name].detach().float()
        if not torch.isfinite(change).all():
            raise FloatingPointError(f"parameter {name} is not finite after training: lower the learning rate")
        if change.any():
            delta[name] = change
    return delta


def _write_run(spec: RunSpec, delta: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
    """Write beside `spec.out` and rename, so that a run folder is complete or absent."""
    out = Path(spec.out)
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        import shutil

        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    vector = vector_from_state(
        delta,
        preference=spec.name,
        base_fingerprint=spec.base_fingerprint,
        dtype=torch.float32,
        data_digest=spec.data_digest,
        recipe={"method": "dpo", "polarity": spec.polarity, "seed": spec.seed, **spec.dpo},
    )
    save_vector(vector, partial / "delta")
    (partial / "run.json").write_text(json.dumps(result, indent=2))
    partial.rename(out)


class _Reporter(TrainerCallback):
    """Hands every log line on, and the step at most twice a second; stops a run whose loss is not finite."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.report({"step": state.global_step, "total": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if not torch.isfinite(torch.tensor(float(logs["loss"]))):
            raise FloatingPointError(f"loss is {logs['loss']} at step {state.global_step}: lower the learning rate")
        if state.is_world_process_zero:
            self.report(
                {
                    "step": state.global_step,
                    "total": state.max_steps,
                    "loss": float(logs["loss"]),
                    "accuracy": float(logs.get("rewards/accuracies", float("nan"))),
                }
            )

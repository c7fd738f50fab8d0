"""What a training will cost, before it starts: memory a device, tokens, and with a dry run the time.

Parameters, gradients and optimizer are counted by the table of docs/clusters.md. Activations are what autograd keeps of
one forward pass, counted on the model without memory (torch's meta device). A dry run trains a few steps where the runs
will train, with their batch, and measures.
"""

import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, load_from_disk
from jinja2 import TemplateError

from prefvec_ray.artifacts.training import Artifact, Method, PreparedPairs
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.measures import common_length, tokenize_pair
from prefvec_ray.training.checkpoints import gigabytes
from prefvec_ray.training.config import TrainingConfig
from prefvec_ray.training.fsdp import sharding
from prefvec_ray.training.progress import duration
from prefvec_ray.training.quantized import BITS, linear_layers
from prefvec_ray.training.references import key_of, working_base
from prefvec_ray.training.worker_groups import start_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 256
"""Pairs of a preference whose tokens are counted."""
DRY_RUN_STEPS = 4


class DryRunResult(Artifact):
    """What a few steps showed, on one device."""

    seconds_a_step: float
    """For one batch of pairs, forward and backward with the optimizer's step: the median of all but the first."""
    reference_seconds: float
    """For the reference log-probs of one batch, the loading of the model left out."""
    memory: int
    """Bytes, at most, of the process on its GPU, or without one in all."""


class DryRunJob(Artifact):
    """A few steps of a run."""

    base: str
    source: str
    """Folder of prepared pairs."""
    pairs: int
    """In a batch of all workers."""
    dpo: dict[str, Any]
    method: Method


@dataclass(frozen=True)
class Cost:
    """Of a run, in bytes a device, and of all runs, in tokens. Everything but `activations` is exact."""

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float | None
    """Kept for the backward pass of one batch of the longest pairs found; None: the model cannot be counted."""
    batch: int
    """Pairs of a device in one pass."""
    workers: int
    """Devices of a run."""
    longest: int
    """Tokens of the longest conversation found, of at most `max_length`."""
    tokens_a_pair: float
    """Mean, the prompt twice: once with each answer."""
    runs: int
    steps: int
    """Of all runs together."""
    pairs: int
    """That all runs train on, epochs included."""
    scored: int
    """Pairs of the reference pass."""

    def lines(self) -> list[str]:
        """For a reader."""
        state = self.weights + self.gradients + self.optimizer
        activations = "not counted for this model"
        if self.activations is not None:
            activations = f"about {gigabytes(self.activations)}"
        trained = f"{self.trained:,} of {self.parameters:,}" if self.trained < self.parameters else f"{self.trained:,}"
        return [
            f"a run trains {trained} parameters; on each device: weights {gigabytes(self.weights)}, gradients "
            f"{gigabytes(self.gradients)}, optimizer {gigabytes(self.optimizer)}, activations {activations} "
            f"({self.batch} pairs of up to {self.longest} tokens); together "
            f"{gigabytes(state + (self.activations or 0))}, and what single operations need for a moment",
            f"{self.runs} runs, {self.steps:,} steps, {self.tokens_a_pair:.0f} tokens a pair: "
            f"{self.tokens_a_pair * self.pairs:,.0f} tokens, and {self.tokens_a_pair * self.scored:,.0f} for the "
            "reference log-probs",
        ]

    def measured(self, seen: DryRunResult, at_once: int) -> list[str]:
        """For a reader, after a dry run; `at_once`: the runs that the cluster holds."""
        at_a_time = self.batch * self.workers
        batches = math.ceil(self.pairs / at_a_time)
        training = seen.seconds_a_step * batches / max(1, min(at_once, self.runs))
        reference = seen.reference_seconds * self.scored / at_a_time
        return [
            f"measured: {seen.seconds_a_step:.2f} s for a batch of {at_a_time} pairs, "
            f"{gigabytes(seen.memory)} at most{' on a device' if self.workers > 1 else ''}",
            f"so about {duration(training)} for the runs, {min(at_once, self.runs)} at once, and "
            f"{duration(reference)} for the reference log-probs by as many workers; held-out measurements and "
            "checkpoints come on top",
        ]


def estimate(config: TrainingConfig, prepared: dict[str, PreparedPairs]) -> Cost:
    """Count parameters, bytes and tokens; nothing is loaded and nothing is run.

    Raises:
        InputError: a base whose model transformers cannot build.
    """
    from trl import DPOConfig

    method, workers = config.run_method, config.resources.workers
    model, parameters, trained, linear = _skeleton(config)
    lengths = [_lengths(config, split) for split in prepared.values()]
    longest = max((whole for _, whole in lengths), default=1)
    pairs = _pairs_of_runs(config, prepared)
    epochs = float(config.recipe.get("num_train_epochs", DPOConfig.num_train_epochs))
    step = config.pairs_at_once * int(config.recipe.get("gradient_accumulation_steps", 1))
    steps = [math.ceil(math.ceil(count / step) * epochs) for count in pairs]
    if (most := int(config.recipe.get("max_steps", -1))) > 0:
        steps = [most] * len(steps)
    half = _half(config)
    stored_half = half and _stored_half(config.base)
    state = _state(parameters, trained, method, workers, half=half, frozen_half=stored_half, linear=linear)
    batch = config.pairs_at_once // workers
    kept = _kept(model, longest, half=half, recompute=_recomputes(config))
    return Cost(
        parameters=parameters,
        trained=trained,
        **state,
        activations=None if kept is None else 2 * batch * kept,
        batch=batch,
        workers=workers,
        longest=longest,
        tokens_a_pair=fmean(tokens for tokens, _ in lengths) if lengths else 0.0,
        runs=len(pairs),
        steps=sum(steps),
        pairs=math.ceil(sum(min(count * epochs, n * step) for count, n in zip(pairs, steps, strict=True))),
        scored=sum(split.pairs + split.test_pairs for split in prepared.values()),
    )


def dry_run_steps(config: TrainingConfig, prepared: dict[str, PreparedPairs]) -> DryRunResult:
    """Train a few steps in a Ray Train run with the resources of the others, and measure them.

    Raises:
        RunsFailedError: it failed, as a run of these settings would: out of memory, for instance.
    """
    split = max(prepared.values(), key=lambda split: split.pairs)
    job = DryRunJob(
        base=str(working_base(config)),
        source=split.train,
        pairs=config.pairs_at_once,
        dpo={**config.dpo, "gradient_accumulation_steps": 1},
        method=config.run_method,
    )
    name = f"dry-run-{key_of(split.digest, config.recipe_key)}"
    run = start_run(
        _dry_run_worker,
        {"job": job.model_dump()},
        name,
        config.resources,
        config.folder / "ray",
        retries=0,
        method=job.method,
    )
    return DryRunResult.model_validate(run.result())


def _dry_run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Body of a Ray Train worker."""
    from prefvec_ray.common.paths import check_visible
    from prefvec_ray.training.workers import worker_setup

    job = DryRunJob.model_validate(config["job"])
    check_visible(job.base, job.source)
    worker_setup()
    with tempfile.TemporaryDirectory() as work_dir:
        return measure_steps(job, work_dir).model_dump()


def measure_steps(job: DryRunJob, work_dir: str | Path) -> DryRunResult:
    """Train `DRY_RUN_STEPS` batches of pairs, the longest pair among them. Every rank calls this."""
    from transformers import PrinterCallback, TrainerCallback

    from prefvec_ray.training.dpo import TokenizedDPOTrainer, dpo_config
    from prefvec_ray.training.lora import adapter_config
    from prefvec_ray.training.model import load_model, load_tokenizer
    from prefvec_ray.training.watch import peak_memory

    class Steps(TrainerCallback):
        ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    class Scored(TokenizedDPOTrainer):
        scoring = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.scoring = time.perf_counter() - started
            return found

    # In memory: TRL keeps reference log-probs beside a set on disk, and would only read them the next time.
    pairs = Dataset.from_list(_with_longest(load_from_disk(job.source), DRY_RUN_STEPS * job.pairs).to_list())
    args = dpo_config(
        job.dpo,
        work_dir,
        **sharding(job.method),
        max_steps=DRY_RUN_STEPS,
        save_strategy="no",
        eval_strategy="no",
    )
    steps = Steps()
    trainer = Scored(
        model=load_model(job.base, job.method, args),
        args=args,
        train_dataset=pairs,
        processing_class=load_tokenizer(job.base),
        callbacks=[steps],
        peft_config=adapter_config(job.method),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    taken = np.diff(steps.ends)
    return DryRunResult(
        seconds_a_step=float(median(taken[1:] if len(taken) > 1 else taken)),
        reference_seconds=trainer.scoring * job.pairs / max(1, len(pairs)),
        memory=peak_memory(),
    )


def _with_longest(pairs: Dataset, count: int) -> Dataset:
    """`count` pairs from all over the set, the one with the most text among them."""
    picked = set(_evenly(len(pairs), min(count, len(pairs))))
    texts = [len(str(row["prompt"])) + max(len(str(row["chosen"])), len(str(row["rejected"]))) for row in pairs]
    picked.discard(min(picked))
    return pairs.select(sorted(picked | {int(np.argmax(texts))}))


def _evenly(total: int, count: int) -> Iterable[int]:
    return np.linspace(0, total - 1, count).astype(int).tolist()


def _pairs_of_runs(config: TrainingConfig, prepared: dict[str, PreparedPairs]) -> list[int]:
    """Training pairs of each run: the polarities of each preference, and one run on mixed data where asked for."""
    counts = [split.pairs for split in prepared.values() for _ in config.polarities]
    if config.mixed:
        counts.append(len(prepared) * (max(counts) // len(prepared)))
    return counts * len(config.seeds)


def _lengths(config: TrainingConfig, split: PreparedPairs) -> tuple[float, int]:
    """Tokens of a pair, the prompt counted twice, on average, and of the longest conversation; both after the cut."""
    from trl import DPOConfig

    from prefvec_ray.training.model import load_tokenizer

    limit = config.dpo.get("max_length", DPOConfig.max_length) or 10**9
    tokenizer, pairs = load_tokenizer(working_base(config)), load_from_disk(split.train)
    totals, longest = [], 1
    for row in pairs.select(_evenly(len(pairs), min(SAMPLE, len(pairs)))):
        try:
            prompt, *sides = tokenize_pair(row, tokenizer)
        except TemplateError:
            continue
        if min(common_length(prompt, side) for side in sides) < limit:  # else it is left out
            totals.append(sum(min(len(side), limit) for side in sides))
            longest = max(longest, *(min(len(side), limit) for side in sides))
    return (fmean(totals) if totals else 0.0), longest


def _skeleton(config: TrainingConfig) -> "tuple[PreTrainedModel, int, int, int]":
    """The model without memory, with its adapter if it has one; all its parameters, those that are trained, and those
    of linear layers that `quantize` rounds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefvec_ray.common.pretrained import from_pretrained
    from prefvec_ray.training.lora import lora_config
    from prefvec_ray.vectors.adapters import skeleton

    stated = from_pretrained(AutoConfig, config.base)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stated)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"base {config.base}: transformers builds no language model of its config ({error})"
        ) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    if config.method == "lora":
        adapted, _, _ = skeleton(config.base, lora_config(config.lora))
        model = adapted.get_base_model()
    return model, parameters, sum(p.numel() for p in model.parameters() if p.requires_grad), linear


def _half(config: TrainingConfig) -> bool:
    """Whether runs compute in 16 bits. On GPUs bf16 is the default."""
    return bool(config.dpo.get("bf16", config.resources.gpus_per_worker > 0) or config.dpo.get("fp16", False))


def _stored_half(base: Path) -> bool:
    import torch
    from transformers import AutoConfig

    from prefvec_ray.common.pretrained import from_pretrained

    return getattr(from_pretrained(AutoConfig, base), "dtype", None) == torch.bfloat16


def _recomputes(config: TrainingConfig) -> bool:
    return any(config.dpo.get(field) for field in ("activation_checkpointing", "gradient_checkpointing"))


def _state(
    parameters: int,
    trained: int,
    method: Method,
    workers: int,
    *,
    half: bool,
    frozen_half: bool,
    linear: int = 0,
) -> dict[str, float]:
    """Bytes a device, by the table of docs/clusters.md; what lies in host memory is not counted."""
    zero = (method.deepspeed or {}).get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    if method.fsdp is not None:
        frozen = (parameters - trained if method.kind == "full" else parameters) * (2 if frozen_half else 4)
        shared = {"weights": frozen + 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        return {name: 0.0 if method.fsdp.get("cpu_offload") else size / workers for name, size in shared.items()}
    if method.quantize is not None:
        rounded = linear * BITS[method.quantize] / 8 + (parameters - linear) * (2 if half else 4)
        return {"weights": rounded + 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
    if stage == 0:
        frozen = parameters - trained if method.kind == "full" else parameters
        weights = frozen * (2 if frozen_half and method.kind == "lora" else 4) + 4 * trained
        return {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained}
    each = 2 if half else 4
    return {
        "weights": 0 if zero.get("offload_param") else each * parameters / (workers if stage == 3 else 1),
        "gradients": each * trained / (workers if stage >= 2 else 1),
        "optimizer": 0 if zero.get("offload_optimizer") else 12 * trained / workers,
    }


def _kept(model: "PreTrainedModel", length: int, *, half: bool, recompute: bool) -> float | None:
    """Bytes that autograd keeps of one conversation of `length` tokens, all but the head's; None: the model does not
    run without memory.

    Attention's weights of (length x length) are left out: fused kernels do not keep them. With recomputation a layer
    keeps its input alone, and one layer at a time all of its own.
    """
    import torch

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    kept: dict[int, torch.Tensor] = {}
    odd = length | 1  # no other size of a model is odd, so (odd x odd) is attention

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        attention = tensor.dim() >= 3 and tensor.shape[-2:] == (odd, odd)
        if not attention:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no two have one address
        return tensor

    model = model.to(torch.bfloat16 if half else torch.float32).train()
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, odd, dtype=torch.long)
        mask = torch.ones(1, 1, odd, odd, dtype=torch.bool)
        masks = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
        try:
            model.get_decoder()(input_ids=ids, position_ids=ids, attention_mask=masks, use_cache=False)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):  # what it computes depends on values
            return None
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned) * length / odd
    if recompute:
        layers = config.num_hidden_layers
        return total / layers + layers * length * config.hidden_size * (2 if half else 4)
    return total

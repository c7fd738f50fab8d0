"""One DPO run (Rafailov et al., arXiv 2305.18290) around TRL's DPOTrainer: tokenized pairs in, an fp32 delta out.

No Ray in here: `run_dpo` and `reference_logps` work in one process, and as the body of every Ray Train worker.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_from_disk
from pyarrow import compute
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from prefvec_ray.artifacts.training import KL, PLAIN, Method, RunResult, RunSpec
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import positions
from prefvec_ray.preferences import flip
from prefvec_ray.training.batches import GroupsByLength
from prefvec_ray.training.checkpoints import (
    checkpoint_folder,
    keep_checkpoints,
    remove_checkpoints,
    run_on_disk,
    saving,
    shared_folder,
)
from prefvec_ray.training.delta import parameter_layout, trained_numbers, write_delta
from prefvec_ray.training.fsdp import FSDPOnCPUs, sharding
from prefvec_ray.training.head import score_answers_only
from prefvec_ray.training.lora import adapter_config
from prefvec_ray.training.model import arguments, compute_dtype, load_model, load_tokenizer
from prefvec_ray.training.recipe import check_whole_batch
from prefvec_ray.training.watch import (
    BASE_ANSWERS,
    Clock,
    Report,
    RunStoppedError,
    Watcher,
    few,
    peak_memory,
    reset_peak_memory,
    tensorboard,
    training_log,
    whole_batches,
)
from prefvec_ray.vectors.checkpoint import check_loaded

TOKENIZED = ["prompt_ids", "chosen_ids", "rejected_ids"]
REFERENCE = ["ref_chosen_logps", "ref_rejected_logps"]


class _WithoutReference(TrainerCallback):
    """Keeps TRL from loading a reference model of its own onto every worker of an FSDP run: it looks after transformers
    has set the trainer up and before it scores anything."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.is_fsdp_enabled = False


class TokenizedDPOTrainer(GroupsByLength, FSDPOnCPUs, DPOTrainer):
    """DPOTrainer that takes pairs already tokenized and scored by the reference model as they are.

    The stock trainer would tokenize them again and refuse the reference columns as duplicates. It also keeps a clock,
    and logs the figures of each held-out set under that set's name.
    """

    _precompute_model_hash: Any
    _scores_answers_only = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()
        # TRL would warn that it pads all the same, and set it back itself.
        self._pads, kwargs["args"].padding_free = not kwargs["args"].padding_free, False
        fsdp = bool(kwargs["args"].fsdp)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), _WithoutReference(self)]
        super().__init__(*args, **kwargs)
        self.is_fsdp_enabled = fsdp
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            for parameter in self.model.parameters():  # TRL rounds adapters beside a quantized base to bf16
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if set(TOKENIZED) <= set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if not self._scores_answers_only:  # first called once the model has TRL's head, before anything is scored
            score_answers_only(self.model, padding_free=not self._pads)
            self._scores_answers_only = True
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        check_context(dataset, self.model, self.args.max_length)
        if self.args.fsdp:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            fsdp2_prepare_model(self.accelerator, self.model)
        # TRL keeps what it computes beside the data, by the weights alone: a run that computes in bf16 would take the
        # figures of one in fp32.
        args = self.args
        sharded = [self.is_deepspeed_enabled, bool(args.fsdp)]
        numbers = [args.bf16, args.fp16, *sharded, args.ld_alpha, args.max_length, self.model.dtype]
        self._precompute_model_hash = f"{self._precompute_model_hash} {numbers}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _lengths(self, rows: Dataset) -> list[int]:
        return pair_lengths(rows, self.args.max_length)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Under DeepSpeed with bf16 transformers rounds all floating inputs to it: reference log-probs of -137.2 would
        become -137.0, and a run would start with margins that are rounding."""
        exact = {name: inputs[name].to(self.args.device) for name in REFERENCE if name in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.spent_on("watching"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.spent_on("checkpoints"):
            super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self._metrics["train"]["num_tokens"][-1]
            logs.update(tokens_per_s=self.clock.tokens_per_second(tokens), memory=peak_memory())
        for name in [key[len("eval_") : -len("_loss")] for key in logs if key.startswith("eval_") and "_loss" in key]:
            figures = {f"{name}/{key}": values for key, values in self._metrics["eval"].items()}
            self._metrics["eval"] = defaultdict(list, figures)
        super().log(logs, start_time)


def pair_lengths(tokens: Dataset, max_length: int | None) -> list[int]:
    """Tokens of the longer conversation of each tokenized pair, after the cut."""
    table = tokens.select_columns(TOKENIZED).with_format("arrow")[:]
    prompt, chosen, rejected = (compute.list_value_length(table[column]) for column in TOKENIZED)
    whole = compute.add(prompt, compute.max_element_wise(chosen, rejected))
    return (compute.min_element_wise(whole, max_length) if max_length else whole).to_pylist()


def check_context(tokens: Dataset, model: PreTrainedModel, max_length: int | None) -> None:
    """Refuse tokenized pairs for which the model has no positions: GPT-2's would end in an index error, rotary ones
    would be trained beyond what the model has learned.

    Raises:
        InputError: names the longest pair and the context.
    """
    context = positions(model.config)
    longest = max(pair_lengths(tokens, max_length), default=0)
    if context is not None and longest > context:
        raise InputError(f"pairs of up to {longest} tokens; the base has a context of {context}: set dpo.max_length")


def dpo_config(recipe: dict[str, Any], output_dir: str | Path, *, seed: int = 0, **overrides: Any) -> DPOConfig:
    """The user's recipe over defaults that hold on CPU and GPU alike, with what the plan owns on top."""
    owned = {"seed": seed, "precompute_ref_log_probs": True}
    return arguments(DPOConfig, {"lr_scheduler_type": "cosine", **recipe, **owned}, output_dir, **overrides)


def reference_logps(
    base: str, pairs: Dataset, recipe: dict[str, Any], work_dir: str | Path, method: Method = PLAIN
) -> Dataset:
    """Tokenize `pairs` and add the base model's summed log-probability of each answer (DPO, eq. 7: pi_ref).

    Args:
        pairs: columns prompt, chosen, rejected, plain or conversational.
        method: of the runs that will use them, so that both compute with the same numbers.

    Returns:
        One row a pair: TOKENIZED and REFERENCE columns. On several workers every rank returns the whole of it.

    Raises:
        InputError: transformers loads other weights than the folder's files hold. Under ZeRO-3, where no process has
            them whole, this is not checked.
    """
    args = dpo_config(recipe, work_dir, **sharding(method))
    model = load_model(base, method, args)
    whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if whole and not (method.fsdp and args.local_process_index):
        check_loaded(model, base)
    trainer = TokenizedDPOTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        processing_class=load_tokenizer(base),
        # Transformers wants a trainer of a quantized model to have adapters; they are switched off for the reference.
        peft_config=adapter_config(method) if method.quantize else None,
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


def run_dpo(spec: RunSpec, report: Report, work_dir: str | Path) -> RunResult | None:
    """Train one run and write its folder: `delta/` (theta_run - theta_base in fp32, vector file format) and `run.json`.

    It continues from its newest whole checkpoint, if it has one, and then equals a run that was never interrupted (bit
    by bit on CPU). `report` gets what `Watcher` measures as training goes on. Every rank calls this and writes its part
    of the delta; rank 0 returns the content of run.json, the others return None.

    Raises:
        RunStoppedError: a figure is not finite or held-out accuracy moves the wrong way; nothing is written.
        DiskFullError: nothing half-written is kept.
    """
    started = time.perf_counter()
    reset_peak_memory()
    set_seed(spec.seed)  # of new adapters; all else is seeded by the trainer
    layout = parameter_layout(spec.base)  # before DeepSpeed is started
    folder = checkpoint_folder(spec.out) if spec.checkpoint_every else work_dir
    method = spec.method
    args = dpo_config(spec.dpo, folder, seed=spec.seed, **sharding(method), **_watch_arguments(spec))
    full, watched = _held_out_sets(spec, args.eval_batch_size * args.world_size)
    watcher = Watcher(report, args.beta, spec.preference, spec.polarity, spec.watch.wrong_way, _sizes(watched))
    train = _training_pairs(spec, args.train_batch_size * args.world_size)
    trainer = TokenizedDPOTrainer(
        model=load_model(spec.base, method, args),
        args=args,
        train_dataset=train,
        eval_dataset=watched,
        processing_class=load_tokenizer(spec.base),
        callbacks=[watcher],
        peft_config=adapter_config(method),
    )
    trainer.remove_callback(PrinterCallback)  # `report` has its lines
    resumed, resumed_at = keep_checkpoints(trainer, spec.checkpoint_every)
    if spec.tensorboard and trainer.is_world_process_zero():
        trainer.add_callback(tensorboard(spec.tensorboard, resumed_at))

    # At most two checkpoints at a time, 12 bytes a parameter each, and then the delta.
    with run_on_disk(spec.out, needed=28 * trained_numbers(trainer.model)):
        try:
            trainer.train(resume_from_checkpoint=resumed)
            figures = _measure_end(trainer, watcher, full)
            with shared_folder(Path(spec.out)) as made:
                precision = write_delta(trainer, method, layout, spec.base, made, **_labels(spec, trainer))
                seconds = round(time.perf_counter() - started, 2)
                figures |= {"seconds": seconds, "resumed_at": resumed_at, "precision": precision}
                result = RunResult(spec=spec, pairs=len(train), **_progress(trainer), **figures)
                if trainer.is_world_process_zero():
                    (made / "run.json").write_text(json.dumps(result.model_dump(), indent=2))
        except RunStoppedError:
            remove_checkpoints(spec.out)
            raise
    if not trainer.is_world_process_zero():
        return None
    remove_checkpoints(spec.out)
    return result


def _training_pairs(spec: RunSpec, batch: int) -> Dataset:
    train = mix_equally([load_from_disk(pairs) for pairs in spec.train], spec.seed)
    check_whole_batch(spec.name, len(train), batch, spec.dpo)
    return flip(train) if spec.polarity == "negative" else train


def _watch_arguments(spec: RunSpec) -> dict[str, Any]:
    """When to measure and when to write a checkpoint, as the trainer's arguments."""
    arguments: dict[str, Any] = {"report_to": list(spec.watch.report_to) or "none", "run_name": spec.key}
    if spec.watch.evaluations:
        arguments |= {"eval_strategy": "steps", "eval_steps": min(1 / spec.watch.evaluations, 0.999)}
    return arguments | saving(spec.checkpoint_every)


def _held_out_sets(spec: RunSpec, batch: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """What a run is measured on at its end, and the few of it that it is measured on while it trains."""
    full = {name: whole_batches(load_from_disk(folder), batch) for name, folder in spec.test.items()}
    watched = {name: few(pairs, spec.watch.held_out_pairs, batch) for name, pairs in full.items()}
    answers = [part for folder in spec.answers if len(part := load_from_disk(folder))]
    if answers:
        full[BASE_ANSWERS] = watched[BASE_ANSWERS] = whole_batches(concatenate_datasets(answers), batch)
    return full, watched


def _sizes(sets: dict[str, Dataset]) -> dict[str, int]:
    return {name: len(pairs) for name, pairs in sets.items()}


def _progress(trainer: TokenizedDPOTrainer) -> dict[str, Any]:
    """How far the training got and what it took, as fields of the run's result."""
    return {
        "steps": trainer.state.global_step,
        "seconds_in": trainer.clock.seconds(),
        "workers": trainer.args.world_size,
        "tokens": int(trainer._total_train_tokens),
        "memory": peak_memory(),
        "history": [training_log(log, trainer.args.beta) for log in trainer.state.log_history if "loss" in log],
    }


def _measure_end(trainer: DPOTrainer, watcher: Watcher, full: dict[str, Dataset]) -> dict[str, Any]:
    """Measure on all held-out pairs. Returns `watched`, `held_out` and `kl` of the run's result."""
    log = trainer.state.log_history
    watched, drift = watcher.held_out(log), watcher.drift(log)
    watcher.pairs = _sizes(full)
    watcher.patience = 1
    trainer.eval_dataset = full
    for name in full:
        trainer.evaluate(name, metric_key_prefix=f"eval_{name}")
    last = trainer.state.log_history[-len(full) :]
    held_out = {name: points[-1] for name, points in watcher.held_out(last).items()}
    if BASE_ANSWERS not in full:
        return {"watched": watched, "held_out": held_out, "kl": None}
    return {"watched": {**watched, KL: drift}, "held_out": held_out, "kl": watcher.drift(last)[-1].kl}


def _labels(spec: RunSpec, trainer: DPOTrainer) -> dict[str, Any]:
    """What the run's delta says about itself."""
    args, method = trainer.args, spec.method
    recipe: dict[str, Any] = {
        "method": "dpo",
        "parameters": method.kind,
        "polarity": spec.polarity,
        "seed": spec.seed,
        **spec.dpo,
        "loss_type": args.loss_type,
        "pairs_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "compute": str(compute_dtype(args)).removeprefix("torch."),
    }
    if method.kind == "lora":
        recipe["lora"] = method.lora
    if method.quantize is not None:
        recipe["quantize"] = method.quantize
    if method.fsdp is not None:
        recipe["fsdp"] = method.fsdp["version"]
    if method.deepspeed:
        recipe["zero_stage"] = method.deepspeed["zero_optimization"]["stage"]
    return {
        "preference": spec.name,
        "base_fingerprint": spec.base_fingerprint,
        "data_digest": spec.data_digest,
        "recipe": recipe,
    }

"""TRL's settings as a config may give them: what the plan decides itself, and what TRL would refuse too late."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from prefvec_ray.common.errors import InputError

# Fields of TRL's DPOConfig that the plan itself decides; a recipe that sets one would silently be overruled.
OWNED = {
    "output_dir": "each run writes into its own folder",
    "seed": "give `seeds`",
    "data_seed": "give `seeds`",
    "precompute_ref_log_probs": "reference log-probs are always computed once and shared",
    "save_strategy": "give `checkpoint_every`; a finished run keeps its fp32 delta",
    "save_steps": "give `checkpoint_every`",
    "save_total_limit": "a run keeps its newest checkpoint while it trains, and none when it has finished",
    "eval_strategy": "give `watch.evaluations`",
    "eval_steps": "give `watch.evaluations`",
    "report_to": "TensorBoard is always written; give `watch.report_to` for others",
    "run_name": "a run is named by its key",
    "logging_nan_inf_filter": "a loss that is not finite stops the run, it is not averaged away",
    "resume_from_checkpoint": "a run continues from its own checkpoint by itself",
    "sync_ref_model": "the reference is the base model and stays fixed",
    "deepspeed": "give `deepspeed` beside `dpo`",
    "fsdp": "give `fsdp` beside `dpo`",
    "fsdp_config": "give `fsdp` beside `dpo`",
    "load_best_model_at_end": "a run ends with its last step, and is stopped when it goes wrong",
    "auto_find_batch_size": "it would change the pairs of a step unseen",
    "push_to_hub": "vectors are published in the registry",
    "parallelism_config": "tensor, context and sequence parallelism are not supported; give `fsdp` or `deepspeed` "
    "for a model larger than one device, and dpo.activation_checkpointing for long conversations",
}

# The same for SFTConfig; its seed is free, since there is one run.
SFT_OWNED = {name: why for name, why in OWNED.items() if name not in ("seed", "data_seed")} | {
    "eval_strategy": "the fine-tuned model is measured by the runs that start from it",
    "eval_steps": "the fine-tuned model is measured by the runs that start from it",
    "report_to": "its losses are kept in sft.json",
    "chat_template_path": "give `chat_template`, which serves both stages",
    "eos_token": "set it in the base's tokenizer, which both stages use",
}

LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""Every loss of TRL's DPOTrainer; none of them needs more columns than a pair and its reference log-probs."""
F_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""Those that depend on the reference through the difference of the two rewards only, as f-divergences need it."""
ABOVE_ZERO = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "max_length"),
)
"""With 0 or less, these train nothing, or fail on the workers after the data and the reference pass."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def check_loss(dpo: dict[str, Any]) -> None:
    """InputError for what TRL would refuse only on the workers."""
    given = dpo.get("loss_type", "sigmoid")
    losses = [given] if isinstance(given, str) else list(given)
    for loss in losses:
        if loss not in LOSS_TYPES:
            raise InputError(f"dpo.loss_type {loss!r} is not one of TRL's{closest(str(loss), LOSS_TYPES)}")
    if "exo_pair" in losses and not dpo.get("label_smoothing"):
        raise InputError("dpo.loss_type exo_pair needs dpo.label_smoothing above 0; its paper recommends 1e-3")
    divergence = dpo.get("f_divergence_type", "reverse_kl")
    if divergence not in DIVERGENCES:
        raise InputError(f"dpo.f_divergence_type {divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    outside = sorted(set(losses) - F_LOSSES)
    if divergence != "reverse_kl" and outside:
        raise InputError(f"dpo.f_divergence_type {divergence} is not defined for loss_type {outside[0]}")
    if dpo.get("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        raise InputError(
            "dpo.use_weighting cannot be used with the aot losses: they sort pairs, weights would not follow"
        )


def check_batches(section: str, recipe: Mapping[str, Any]) -> None:
    """InputError for ways to make batches that would change what a run learns, or do other than they say."""
    if recipe.get("train_sampling_strategy") == "batch_rebalance":
        raise InputError(
            f"{section}.train_sampling_strategy batch_rebalance gives workers batches of unequal size, so that the "
            "weight of a pair depends on its neighbours: give group_by_length"
        )
    if section == "sft" and recipe.get("padding_free") and not recipe.get("packing") and recipe.get("max_length", 1):
        raise InputError(
            "sft.padding_free does not cut at sft.max_length (TRL): set sft.packing: true, or sft.max_length: null"
        )


def check_names(section: str, recipe: Mapping[str, Any], kind: Any, library: str) -> None:
    """InputError for a field that this config class of a library does not have."""
    known = {field.name for field in dataclasses.fields(kind)}
    for field in recipe:
        if field not in known:
            raise InputError(f"{section}.{field} is not a field of {library}'s {kind.__name__}{closest(field, known)}")


def check_fields(section: str, recipe: dict[str, Any], kind: type) -> None:
    """InputError for a field that this TRL config does not have, a value of another type, or one that it refuses."""
    check_names(section, recipe, kind, "TRL")
    types = get_type_hints(kind)
    for field, value in recipe.items():
        wanted = types[field]
        try:
            # TRL takes a list of one name without its brackets.
            TypeAdapter(wanted | str if wanted == list[str] else wanted).validate_python(value, strict=True)
        except ValidationError:
            name = wanted.__name__ if type(wanted) is type else str(wanted)
            raise InputError(f"{section}.{field}: expected {name}, got {value!r}") from None
        if field in ABOVE_ZERO and value is not None and value <= 0:
            raise InputError(f"{section}.{field} must be above 0, got {value!r}")
    if recipe.get("max_steps") == 0:
        raise InputError(f"{section}.max_steps is 0, so nothing would be trained; leave it out to train whole epochs")
    # What depends on the device is decided where the workers are: this machine may have none.
    here = {"bf16": False, "fp16": False, "tf32": None, "use_cpu": True, "ddp_backend": None}
    try:
        kind(output_dir="unused", **{**recipe, **here})
    except (ValueError, TypeError) as error:
        raise InputError(f"{section}: TRL's {kind.__name__} refuses the recipe: {error}") from error


def check_whole_batch(name: str, pairs: int, batch: int, recipe: Mapping[str, Any]) -> None:
    """InputError where `dataloader_drop_last` leaves nothing to train on: `pairs` are fewer than a step's `batch`."""
    if recipe.get("dataloader_drop_last") and pairs < batch:
        advice = "lower per_device_train_batch_size, or leave dataloader_drop_last out"
        raise InputError(f"{name}: {pairs} pairs make no batch of {batch}; {advice}")


def closest(word: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

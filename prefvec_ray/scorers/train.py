"""A reward model from preference data, around TRL's RewardTrainer (Bradley-Terry: -log sigmoid(r_chosen - r_rejected);
InstructGPT, arXiv 2203.02155, eq. 1), and what it is worth on pairs whose prompts it never saw.

The held-out figures come from the saved folder, read by the same `ClassifierScorer` that a search will use.
"""

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefvec_ray.common.extras import require

require("train", "trl", "accelerate")

from datasets import Dataset
from pydantic import Field
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.config import Config
from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import read_json
from prefvec_ray.common.paths import check_lasting
from prefvec_ray.common.pretrained import context_length, from_pretrained
from prefvec_ray.preferences import data_digest, give_template, load_preferences, split_by_prompt
from prefvec_ray.preferences.splits import text_key
from prefvec_ray.scorers.base import Scorer, run_scorer
from prefvec_ray.scorers.classifiers import SCORER_FILE, ClassifierScorer, ScorerFile, model_digest
from prefvec_ray.scorers.held_out import HeldOut, held_out_report

OWNED = ("output_dir", "seed", "data_seed", "save_strategy", "chat_template_path", "eos_token", "model_init_kwargs")
"""Fields of TRL's RewardConfig that this job sets itself."""

Progress = Callable[[int, int], None]


class ScorerTrainingConfig(Config):
    """`prefvec train-scorer --config FILE`."""

    base: Path
    """Folder of any Hugging Face model; a language model gets a new head with one output."""
    data: str
    """Preference pairs, see `load_preferences`."""
    output: Path
    """Folder of the scorer; must not exist."""
    metric: str
    """What the pairs are ordered by: the name of the metric, higher is better."""
    format: str | None = None
    label: str | None = None
    """In data labelled for several preferences, which label orders the pair."""
    rows: int | None = Field(default=None, gt=0)
    test: str | None = None
    """A source of held-out pairs; when left out, `test_fraction` of the prompts is held out."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    safety: bool = False
    """The metric decides harmlessness: reports ask for an audit of this scorer."""
    chat_template: str | None = None
    """A Jinja file, or `transcript`, for a base whose tokenizer brings none."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens; pairs with a longer text are left out and counted. Default: what the base allows, at most 1,024."""
    balance_length: bool = False
    """Train on as many pairs whose chosen answer is the longer one as on pairs where it is the shorter, so that length
    alone earns nothing. Held-out pairs stay as they are."""
    seed: int = 0
    trainer: dict[str, Any] = {}
    """Any further field of TRL's `RewardConfig`."""


def train_scorer(config: ScorerTrainingConfig, progress: Progress | None = None) -> HeldOut:
    """Train a reward model and write it to `config.output`: safetensors, tokenizer, `scorer.json`.

    The folder appears whole or not at all. Its `scorer.json` is a `ScorerFile` with `trained_on`, `held_out`, `base`,
    `recipe` and what was left out. `progress(step, total)` is called as it trains.

    Raises:
        InputError: anything in config, base or data that cannot be used; before training starts.
        JobError: the loss became infinite or NaN.
    """
    check_lasting(output=config.output)
    if config.output.exists():
        raise InputError(f"output {config.output}: exists already; name a new folder, or delete it")
    tokenizer = _tokenizer(config)
    train, test, notes = _pairs(config)
    max_length = config.max_length or min(1024, _context(config.base, tokenizer))
    train = _fitting(config, train, "training", tokenizer, max_length, notes)
    test = _fitting(config, test, "held-out", tokenizer, max_length, notes)
    longer_wins = sum(math.copysign(1, c - r) for c, r in _lengths(train) if c != r) >= 0
    if config.balance_length:
        before, train = len(train), _balanced(train, config.seed)
        notes.append(f"{len(train)} of {before} training pairs kept, balanced by length")

    began = time.perf_counter()
    with new_folder(config.output) as folder:
        _fit(config, train, tokenizer, max_length, folder, progress)
        stated = ScorerFile(
            kind="reward-model",
            metric=config.metric,
            direction="maximize",
            encoding="chat",
            safety=config.safety,
            max_length=max_length,
        )
        (folder / SCORER_FILE).write_text(stated.model_dump_json())
        held_out = _measure(ClassifierScorer(folder), config.metric, test, longer_wins)
        record = {
            **stated.model_dump(),
            "low": None,
            "high": None,
            "model_digest": model_digest(folder),
            "base": str(config.base),
            "trained_on": data_digest(train),
            "training_pairs": len(train),
            "held_out_on": data_digest(test),
            "held_out": held_out.model_dump(),
            "recipe": {"seed": config.seed, "balance_length": config.balance_length, **config.trainer},
            "notes": notes,
            "seconds": round(time.perf_counter() - began, 1),
        }
        (folder / SCORER_FILE).write_text(json.dumps(record, indent=2))
    return held_out


def show(held_out: HeldOut, config: ScorerTrainingConfig, console: Console) -> None:
    """The held-out figures as a table, chance and length alone beside them."""
    rows = {
        "accuracy": held_out.accuracy,
        "  where the chosen answer is longer": held_out.chosen_longer,
        "  where it is shorter": held_out.chosen_shorter,
        "  mean of the two (length alone: 0.5)": held_out.balanced,
        "length alone": held_out.longer,
        "gain over length alone": held_out.gain_over_longer,
    }
    table = Table(title=f"{held_out.pairs} held-out pairs, prompts never seen; chance is 0.5", title_justify="left")
    for column in (config.metric, "mean ± standard error", "prompts"):
        table.add_column(column, justify="left" if column == config.metric else "right")
    for name, value in rows.items():
        table.add_row(name, str(value or "–"), str(value.n if value else 0))
    console.print(table)
    low, high = held_out.interval
    console.print(
        f"95% interval of the accuracy [{low:.3f}, {high:.3f}]; log-loss {held_out.log_loss:.3f} (chance 0.693), "
        f"calibration error {held_out.calibration_error:.3f}",
        soft_wrap=True,
    )
    for note in read_json(config.output / SCORER_FILE, "train it again")["notes"]:
        console.print(note, soft_wrap=True)
    if low <= 0.5:
        console.print("not distinguishable from chance: a search should not follow this scorer", soft_wrap=True)
    elif held_out.balanced and held_out.balanced.mean - 2 * (held_out.balanced.stderr or 0) <= 0.5:
        console.print("not distinguishable from a measure of length: try balance_length, and score length beside it")
    console.print(f"scorer: {config.output}", soft_wrap=True)


def _fit(
    config: ScorerTrainingConfig,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    out: Path,
    progress: Progress | None,
) -> None:
    trainer = RewardTrainer(
        model=str(config.base),
        args=_recipe(config, max_length, out / "work"),
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[_Watch(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.config.pad_token_id = tokenizer.pad_token_id
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "work", ignore_errors=True)


def _recipe(config: ScorerTrainingConfig, max_length: int, folder: Path) -> RewardConfig:
    known = {field.name for field in dataclasses.fields(RewardConfig)}
    for name in config.trainer:
        if name in OWNED or name == "max_length" or name not in known:
            why = "is no field of TRL's RewardConfig" if name not in known else "is set by this job"
            raise InputError(f"trainer.{name} {why}; remove it")
    gpu = best_device().type == "cuda"
    defaults: dict[str, Any] = {
        "bf16": gpu,
        "use_cpu": not gpu,
        "activation_checkpointing": False,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
    }
    owned = {
        "output_dir": str(folder),
        "seed": config.seed,
        "save_strategy": "no",
        "max_length": max_length,
    }
    try:
        return RewardConfig(**{**defaults, **config.trainer, **owned})
    except (ValueError, TypeError) as error:
        raise InputError(f"trainer: TRL's RewardConfig refuses the recipe: {error}") from error


def _tokenizer(config: ScorerTrainingConfig) -> PreTrainedTokenizerBase:
    if not (config.base / "config.json").is_file() or not any(config.base.glob("*.safetensors")):
        raise InputError(f"base {config.base}: expected the folder of a Hugging Face model, with safetensors")
    _recipe(config, 8, config.output)  # a mistake there is found before the data is read
    tokenizer = from_pretrained(AutoTokenizer, config.base)
    if config.chat_template is not None:
        give_template(tokenizer, config.chat_template)
    if tokenizer.chat_template is None:
        raise InputError(f"base {config.base}: its tokenizer has no chat template; set chat_template")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pairs(config: ScorerTrainingConfig) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out pairs as conversations, and what was left out."""
    loaded = load_preferences(config.data, preference=config.label, format=config.format, rows=config.rows)
    notes = list(loaded.notes)
    if config.test is None:
        train, test = split_by_prompt(loaded.dataset, config.test_fraction, config.seed)
    else:
        train = loaded.dataset
        test = load_preferences(config.test, preference=config.label, format=config.format).dataset
        shared = {text_key(prompt) for prompt in train["prompt"]} & {text_key(prompt) for prompt in test["prompt"]}
        if shared:
            raise InputError(f"{config.test}: {len(shared)} of its prompts are in {config.data} too; hold out others")
    return _as_chat(train), _as_chat(test), notes


def _as_chat(dataset: Dataset) -> Dataset:
    if not isinstance(dataset[0]["prompt"], str):
        return dataset
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list(
        [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in dataset]
    )


def _fitting(
    config: ScorerTrainingConfig,
    pairs: Dataset,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    notes: list[str],
) -> Dataset:
    """The pairs whose texts fit in `max_length` tokens; how many are left out goes into `notes`."""
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    sizes = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    kept = [i for i in range(len(pairs)) if max(sizes[2 * i : 2 * i + 2]) <= max_length]
    if not kept:
        raise InputError(f"{config.data}: no {kind} pair fits in {max_length} tokens; raise max_length")
    if len(kept) < len(pairs):
        notes.append(f"{len(pairs) - len(kept)} of {len(pairs)} {kind} pairs left out, longer than {max_length}")
    return pairs.select(kept)


def _balanced(pairs: Dataset, seed: int) -> Dataset:
    """All pairs of equal length, and as many with a longer chosen answer as with a shorter one."""
    sides: dict[int, list[int]] = {-1: [], 0: [], 1: []}
    for i, (chosen, rejected) in enumerate(_lengths(pairs)):
        sides[(chosen > rejected) - (chosen < rejected)].append(i)
    few = min(len(sides[-1]), len(sides[1]))
    rng = random.Random(seed)
    kept = sides[0] + rng.sample(sides[-1], few) + rng.sample(sides[1], few)
    if not kept:
        raise InputError("balance_length: the chosen answer is always on one side of the rejected one's length")
    return pairs.select(sorted(kept))


def _measure(scorer: Scorer, metric: str, test: Dataset, longer_wins: bool) -> HeldOut:
    prompts = list(test["prompt"])

    def rewards(side: str) -> list[float | None]:
        """An answer of several turns: all but the last are part of what was asked."""
        answers = list(test[side])
        asked = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
        return run_scorer(scorer, asked, [answer[-1]["content"] for answer in answers])[metric]

    try:
        chosen, rejected = rewards("chosen"), rewards("rejected")
    except ValueError as error:
        raise JobError(f"the trained model gives no rewards that could be used: {error}") from error
    margins = [float(c) - float(r) for c, r in zip(chosen, rejected, strict=True)]  # type: ignore[arg-type]
    keys = [str(text_key(prompt)) for prompt in prompts]
    return held_out_report(margins, keys, _lengths(test), longer_wins=longer_wins)


def _lengths(pairs: Dataset) -> list[tuple[int, int]]:
    """Characters of each pair's answers, all their turns together."""

    def length(answer: list[dict[str, str]]) -> int:
        return sum(len(turn["content"]) for turn in answer)

    return [(length(c), length(r)) for c, r in zip(pairs["chosen"], pairs["rejected"], strict=True)]


def _context(base: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    return min(int(tokenizer.model_max_length), context_length(base) or 10**9)


class _Watch(TrainerCallback):
    """Reports the step, and ends a run whose loss is not finite."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0.0))):
            raise JobError(f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate")

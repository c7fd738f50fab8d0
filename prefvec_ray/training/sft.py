"""Supervised fine-tuning before DPO: its result is the base of everything after it.

TRL's SFTTrainer with the method and the resources of the DPO runs. The result lies under `<folder>/sft/`, in the base's
own dtypes, keyed by what it was made from. A later job with the same key uses it as it is.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from prefvec_ray.artifacts.training import Artifact, Method
from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_visible
from prefvec_ray.preferences.sources import read_rows
from prefvec_ray.training.config import SftStage, TrainingConfig
from prefvec_ray.training.plan import run_stage
from prefvec_ray.training.references import key_of, working_base
from prefvec_ray.training.workers import worker_setup
from prefvec_ray.vectors import PreferenceVector, export_model, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerState

MESSAGES = List({"role": Value("string"), "content": Value("string")})
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
"""The columns that SFTTrainer learns from; the first that a row has are taken, others are left behind."""


class SftJob(Artifact):
    """The stage as its workers get it. `sft.json` keeps the fields from `base` to `method`."""

    base: str
    base_fingerprint: str
    data_digest: str
    recipe: dict[str, Any]
    """Fields of TRL's SFTConfig."""
    method: Method
    data: str
    """Arrow file of the examples."""
    checkpoint_every: float | None
    out: str


def fine_tuned(config: TrainingConfig, board: Any) -> TrainingConfig:
    """The config whose base is the result of its SFT stage, trained now unless it is there; without a stage, itself.

    Raises:
        InputError: rows that SFTTrainer cannot learn from.
        RunsFailedError: the stage failed; no DPO run was started.
    """
    if config.sft is None:
        return config
    start = working_base(config)
    data, digest, examples = write_examples(config.sft, start, config.folder / "data")
    template = json.dumps([(start / name).read_text() for name in _tokenizer_files(start)])
    recipe = json.dumps([config.sft.recipe, config.run_method.model_dump(), config.resources.workers], sort_keys=True)
    base = fingerprint(start)
    key = key_of(base, digest, template, recipe)
    job = SftJob(
        base=str(start),
        base_fingerprint=base,
        data_digest=digest,
        recipe=config.sft.recipe,
        method=config.run_method,
        data=str(data),
        checkpoint_every=config.checkpoint_every,
        out=str(config.folder / "sft" / key),
    )
    out = Path(job.out)
    if not (out / "sft.json").is_file():
        run_stage(
            _sft_worker,
            job,
            f"sft-{key}",
            config,
            board,
            resources=config.resources,
            row="sft",
            what="supervised fine-tuning",
            steps=f"steps of fine-tuning on {examples} examples",
        )
    return config.model_copy(update={"base": out, "chat_template": None, "sft": None})


def write_examples(stage: SftStage, base: Path, folder: Path) -> tuple[Path, str, int]:
    """The stage's examples as one Arrow file in `folder`, its digest and their number; memory does not grow with them.

    The columns are the first of SHAPES that the first row has; of messages only role and content are kept.

    Raises:
        InputError: another shape, in the first row or later; conversations for a tokenizer without chat template.
    """
    from prefvec_ray.training.model import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".sft.partial"
    hasher, count = blake3(), 0
    writer: Any = None
    columns: tuple[str, ...] = ()
    kinds: dict[str, type] = {}
    try:
        for found in read_rows(stage.data, split=stage.split, subset=stage.subset, revision=stage.revision):
            row = found.row if isinstance(found.row, dict) else {}
            columns = columns or next((shape for shape in SHAPES if all(name in row for name in shape)), ())
            example = {name: _example(name, row.get(name)) for name in columns}
            if not columns or None in example.values():
                wanted = " and ".join(columns) if columns else "messages, or prompt and completion, or text"
                raise InputError(
                    f"sft {found.where}: expected {wanted} with text or messages in it, got {sorted(row)[:6]}"
                )
            if writer is None:
                kinds = {name: type(value) for name, value in example.items()}
                if list in kinds.values() and load_tokenizer(base).chat_template is None:
                    raise InputError(
                        f"sft.data {stage.data}: conversations, but the base's tokenizer has no chat template"
                    )
                columns_of = {name: MESSAGES if kind is list else Value("string") for name, kind in kinds.items()}
                writer = ArrowWriter(path=str(partial), features=Features(columns_of))
            if kinds != {name: type(value) for name, value in example.items()}:
                raise InputError(f"sft {found.where}: text where the first row has messages, or messages for text")
            hasher.update(json.dumps(example).encode())
            writer.write(example)
            count += 1
            if count == stage.rows:
                break
        if writer is None:
            raise InputError(f"sft.data {stage.data}: holds no examples")
        writer.finalize()
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    digest = hasher.hexdigest()
    return partial.rename(folder / f"sft-{digest[:10]}.arrow"), digest, count


def _example(column: str, value: Any) -> str | list[dict[str, str]] | None:
    """Text, or messages where the column may hold a conversation; None for an empty value or another type."""
    if isinstance(value, str):
        return value if value and column != "messages" else None
    if not isinstance(value, list) or column == "text" or not value:
        return None
    if not all(isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in value):
        return None
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _tokenizer_files(base: Path) -> list[str]:
    return sorted(path.name for path in base.iterdir() if "token" in path.name or path.suffix == ".jinja")


def _sft_worker(config: dict[str, Any]) -> None:
    """Body of a Ray Train worker."""
    job, board = SftJob.model_validate(config["job"]), config["board"]
    check_visible(job.base, job.data)
    worker_setup()
    board.begin.remote("sft")
    with tempfile.TemporaryDirectory() as work_dir:
        run_sft(job, lambda values: board.update.remote("sft", values), work_dir)


def run_sft(job: SftJob, report: "Callable[[dict[str, Any]], None]", work_dir: str | Path) -> None:
    """Train and write `job.out`, a Hugging Face folder; its `sft.json` comes last, and marks it as finished. Every rank
    calls this.

    The result is the base plus the run's fp32 delta, rounded once to the base's dtypes, with the base's own tokenizer.
    It continues from the newest whole checkpoint.

    Raises:
        RunStoppedError: the loss or a parameter is not finite; nothing is written.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from prefvec_ray.training.checkpoints import checkpoint_folder, keep_checkpoints, remove_checkpoints, saving
    from prefvec_ray.training.delta import parameter_layout, run_vector
    from prefvec_ray.training.lora import adapter_config
    from prefvec_ray.training.model import arguments, load_model, load_tokenizer

    base, method = job.base, job.method
    layout = parameter_layout(base)  # before DeepSpeed is started
    folder = checkpoint_folder(job.out) if job.checkpoint_every else work_dir
    args = arguments(SFTConfig, job.recipe, folder, deepspeed=method.deepspeed, **saving(job.checkpoint_every))
    trainer = SFTTrainer(
        model=load_model(base, method, args),
        args=args,
        train_dataset=Dataset.from_file(job.data),
        processing_class=load_tokenizer(base),
        callbacks=[_reporter(report)],
        peft_config=adapter_config(method),
    )
    trainer.remove_callback(PrinterCallback)
    resumed, _ = keep_checkpoints(trainer, job.checkpoint_every)
    trainer.train(resume_from_checkpoint=resumed)
    vector = run_vector(
        trainer,
        method,
        layout,
        base,
        Path(work_dir) / "adapter",
        preference="sft",
        base_fingerprint=job.base_fingerprint,
        data_digest=job.data_digest,
        recipe={"method": "sft", "parameters": method.kind, **job.recipe},
    )
    if vector is not None:
        _write_model(job, vector, trainer.state)
        remove_checkpoints(job.out)


def _write_model(job: SftJob, vector: PreferenceVector, state: "TrainerState") -> None:
    """Base plus delta, then `sft.json`."""
    out = Path(job.out)
    export_model(job.base, {"sft": vector}, {"sft": 1.0}, out, overwrite=True, base_fingerprint=job.base_fingerprint)
    history = [{"step": log["step"], "loss": log["loss"]} for log in state.log_history if "loss" in log]
    made_from = job.model_dump(include={"base", "base_fingerprint", "data_digest", "recipe", "method"})
    write_whole(out / "sft.json", json.dumps({**made_from, "steps": state.global_step, "history": history}))


def _reporter(report: "Callable[[dict[str, Any]], None]") -> Any:
    from transformers import TrainerCallback

    from prefvec_ray.training.watch import RunStoppedError

    class Reporter(TrainerCallback):
        """Reports each logged loss, and stops the run when it is not finite."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise RunStoppedError(
                        f"sft: loss is {logs['loss']} at step {state.global_step}: lower learning_rate"
                    )
                if state.is_world_process_zero:
                    report({"step": state.global_step, "total": state.max_steps, "loss": logs["loss"]})

    return Reporter()

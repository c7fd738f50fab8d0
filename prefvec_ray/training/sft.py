"""Supervised fine-tuning before DPO: its result is the base of everything after it.

TRL's SFTTrainer with the method and the resources of the DPO runs. The result lies under `<folder>/sft/`, in the base's
own dtypes, keyed by what it was made from. A later job with the same key uses it as it is.
"""

import json
import math
import shutil
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
from prefvec_ray.preferences.demonstrations import Demonstrations
from prefvec_ray.training.config import SftStage, TrainingConfig
from prefvec_ray.training.plan import run_stage
from prefvec_ray.training.references import key_of, working_base
from prefvec_ray.training.worker_groups import WorkerGroups
from prefvec_ray.training.workers import worker_setup
from prefvec_ray.vectors import PreferenceVector, export_model, fingerprint, load_vector

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerState

MESSAGES = List({"role": Value("string"), "content": Value("string")})


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


def fine_tuned(config: TrainingConfig, groups: WorkerGroups) -> TrainingConfig:
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
    recipe = json.dumps([config.sft.recipe, config.run_method.key, config.resources.workers], sort_keys=True)
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
            groups,
            resources=config.resources,
            row="sft",
            what="supervised fine-tuning",
            steps=f"steps of fine-tuning on {examples} examples",
        )
    return config.model_copy(update={"base": out, "chat_template": None, "sft": None})


def write_examples(stage: SftStage, base: Path, folder: Path) -> tuple[Path, str, int]:
    """The stage's examples as one Arrow file in `folder`, its digest and their number; memory does not grow with them.

    Raises:
        InputError: rows that cannot be used; conversations for a tokenizer without chat template.
    """
    from prefvec_ray.training.model import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".sft.partial"
    hasher = blake3()
    writer: Any = None
    examples = demonstrations(stage)
    try:
        for example in examples:
            if writer is None:
                kinds = {name: type(value) for name, value in example.items()}
                if list in kinds.values() and load_tokenizer(base).chat_template is None:
                    raise InputError(
                        f"sft.data {stage.data}: conversations, but the base's tokenizer has no chat template; set "
                        "chat_template to a Jinja file or to 'transcript'"
                    )
                columns_of = {name: MESSAGES if kind is list else Value("string") for name, kind in kinds.items()}
                writer = ArrowWriter(path=str(partial), features=Features(columns_of))
            hasher.update(json.dumps(example).encode())
            writer.write(example)
        writer.finalize()
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    for note in examples.notes:
        print(f"   sft: {note}", flush=True)
    digest = hasher.hexdigest()
    return partial.rename(folder / f"sft-{digest[:10]}.arrow"), digest, examples.count


def demonstrations(stage: SftStage) -> Demonstrations:
    """The stage's examples, to be read."""
    return Demonstrations(
        stage.data,
        split=stage.split,
        subset=stage.subset,
        revision=stage.revision,
        limit=stage.rows,
        skip_bad=stage.skip_bad,
    )


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
    from trl import SFTConfig

    from prefvec_ray.training.checkpoints import (
        checkpoint_folder,
        keep_checkpoints,
        remove_checkpoints,
        saving,
        shared_folder,
    )
    from prefvec_ray.training.delta import parameter_layout, write_delta
    from prefvec_ray.training.fsdp import sharding
    from prefvec_ray.training.head import score_answers_only
    from prefvec_ray.training.lora import adapter_config
    from prefvec_ray.training.model import arguments, load_model, load_tokenizer

    base, method = job.base, job.method
    layout = parameter_layout(base)  # before DeepSpeed is started
    folder = checkpoint_folder(job.out) if job.checkpoint_every else work_dir
    args = arguments(SFTConfig, job.recipe, folder, **sharding(method), **saving(job.checkpoint_every))
    trainer = _trainer_class()(
        model=load_model(base, method, args),
        args=args,
        train_dataset=Dataset.from_file(job.data),
        processing_class=load_tokenizer(base),
        callbacks=[_reporter(report)],
        peft_config=adapter_config(method),
    )
    trainer.remove_callback(PrinterCallback)
    score_answers_only(trainer.model)
    resumed, _ = keep_checkpoints(trainer, job.checkpoint_every)
    trainer.train(resume_from_checkpoint=resumed)
    labels = {
        "preference": "sft",
        "base_fingerprint": job.base_fingerprint,
        "data_digest": job.data_digest,
        "recipe": {"method": "sft", "parameters": method.kind, **job.recipe},
    }
    delta = Path(job.out).with_name(f".{Path(job.out).name}.delta")
    if trainer.is_world_process_zero():  # of a job that was killed here
        shutil.rmtree(delta, ignore_errors=True)
    with shared_folder(delta) as made:
        write_delta(trainer, method, layout, base, made, **labels)
    if trainer.is_world_process_zero():
        _write_model(job, load_vector(delta / "delta"), trainer.state)
        shutil.rmtree(delta)
        remove_checkpoints(job.out)


def _write_model(job: SftJob, vector: PreferenceVector, state: "TrainerState") -> None:
    """Base plus delta, then `sft.json`."""
    out = Path(job.out)
    export_model(job.base, {"sft": vector}, {"sft": 1.0}, out, overwrite=True, base_fingerprint=job.base_fingerprint)
    history = [{"step": log["step"], "loss": log["loss"]} for log in state.log_history if "loss" in log]
    made_from = job.model_dump(include={"base", "base_fingerprint", "data_digest", "recipe", "method"})
    write_whole(out / "sft.json", json.dumps({**made_from, "steps": state.global_step, "history": history}))


def _trainer_class() -> Any:
    from trl import SFTTrainer

    from prefvec_ray.training.batches import GroupsByLength
    from prefvec_ray.training.fsdp import FSDPOnCPUs

    class Trainer(GroupsByLength, FSDPOnCPUs, SFTTrainer):
        """TRL's, with FSDP on CPUs too, and length-grouped batches that are the same when a run is resumed."""

        def _lengths(self, rows: Dataset) -> list[int]:
            return [len(ids) for ids in rows["input_ids"]]

    return Trainer


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

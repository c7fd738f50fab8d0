"""Reference log-probs (DPO, arXiv 2305.18290, eq. 7: pi_ref), once per base x data x tokenization, for all runs.

They lie under `<folder>/reference/`, where every run of this job and of later ones finds them, in both polarities: no
run holds a reference model. Each pass that was made adds a line to `passes.jsonl`.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from datasets import Dataset, load_from_disk

from prefvec_ray.artifacts.training import Artifact, Method, PreparedPairs, ReferencePairs
from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.paths import check_visible
from prefvec_ray.training.config import TrainingConfig
from prefvec_ray.training.dpo import dpo_config, reference_logps
from prefvec_ray.training.model import load_tokenizer
from prefvec_ray.training.plan import run_stage, slots
from prefvec_ray.training.worker_groups import WorkerGroups, worker_groups
from prefvec_ray.training.workers import worker_setup
from prefvec_ray.vectors import fingerprint

PAIRS_PER_WORKER = 4096
"""With fewer, another worker costs more to start than it saves."""


class ScoringTask(Artifact):
    """One set of pairs to tokenize and score: those in the folder `source`, or answers of the base to their prompts."""

    target: str
    """Folder that appears, complete, when the set is scored."""
    source: str
    pairs: int
    samples: int | None = None
    """Answers to draw, two a prompt; None: the pairs themselves are scored."""
    tokens: int = 0
    """Length of an answer, at most."""


class ReferenceJob(Artifact):
    """The sets that one pass over the base scores."""

    base: str
    dpo: dict[str, Any]
    method: Method
    tasks: list[ScoringTask]


def compute_references(
    config: TrainingConfig, prepared: dict[str, PreparedPairs], groups: WorkerGroups | None = None
) -> dict[str, ReferencePairs]:
    """Reference log-probs of every split and of a few answers of the base itself, on one worker group.

    A large data set is scored by as many workers as the cluster has free for it.

    Args:
        groups: of the job; made for this pass alone where they are left out.

    Returns:
        By preference.

    Raises:
        RunsFailedError: the pass failed; no run was started.
    """
    if groups is None:
        with worker_groups(config.folder, config.folder / "ray", retries=config.retries) as groups:
            return compute_references(config, prepared, groups)
    key, watch = _tokenization_key(config), config.watch
    references: dict[str, ReferencePairs] = {}
    tasks = []
    for name, split in prepared.items():
        folder = config.folder / "reference" / f"{Path(split.train).parent.name}-{key}"
        train, test = str(folder / "train"), str(folder / "test")
        tasks += [
            ScoringTask(target=train, source=split.train, pairs=split.pairs),
            ScoringTask(target=test, source=split.test, pairs=split.test_pairs),
        ]
        answers = None
        if samples := watch.kl_samples if watch.kl_samples >= 2 else None:
            answers = str(folder / f"answers-{samples}x{watch.kl_tokens}")
            drawn = ScoringTask(target=answers, source=test, pairs=samples, samples=samples, tokens=watch.kl_tokens)
            tasks.append(drawn)
        references[name] = ReferencePairs(train=train, test=test, digest=split.digest, answers=answers)
    if missing := [task for task in tasks if not Path(task.target).is_dir()]:
        _run_pass(config, missing, groups)
    return references


def _tokenization_key(config: TrainingConfig) -> str:
    """Of all that the log-probs depend on beside the pairs: base, tokenizer, lengths, compute dtype."""
    tokenizer = load_tokenizer(working_base(config))
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    shape = {field: config.dpo.get(field) for field in ("max_length", "truncation_mode", "ld_alpha", "pad_token")}
    half = [config.dpo.get("bf16", config.resources.gpus_per_worker > 0), config.dpo.get("fp16", False)]
    if any(half):  # rounded in another way under DeepSpeed, and over a frozen base in bf16
        shape["half"] = [*half, config.deepspeed is not None, config.method, *(["fsdp"] if config.fsdp else [])]
    if config.quantize:
        shape["quantize"] = config.quantize
    return key_of(fingerprint(config.base), vocabulary, tokenizer.chat_template or "", json.dumps(shape))


def _run_pass(config: TrainingConfig, tasks: list[ScoringTask], groups: WorkerGroups) -> None:
    """Score the tasks on the cluster, and show how far it is."""
    job = ReferenceJob(base=str(working_base(config)), dpo=config.dpo, method=config.run_method, tasks=tasks)
    wanted = sum(task.pairs for task in tasks) // PAIRS_PER_WORKER
    times = max(1, min(slots(config.resources, free=True), wanted))
    resources = config.resources.model_copy(update={"workers": config.resources.workers * times})
    run_stage(
        _reference_worker,
        job,
        f"reference-{key_of(*(task.target for task in tasks))}",
        config,
        groups,
        resources=resources,
        row="reference",
        what="the pass over the reference model",
        steps="sets of pairs with reference log-probs, once for all runs",
    )


def _reference_worker(config: dict[str, Any]) -> None:
    """Body of a Ray Train worker."""
    job, board = ReferenceJob.model_validate(config["job"]), config["board"]
    check_visible(job.base, *(task.source for task in job.tasks if task.samples is None))
    worker_setup()
    board.begin.remote("reference")
    write_references(job, lambda done, total: board.update.remote("reference", {"step": done, "total": total}))


def write_references(job: ReferenceJob, report: Callable[[int, int], None]) -> None:
    """Score every set that is missing; each appears whole or not at all. Rank 0 calls `report(done, total)`."""
    import torch.distributed as dist

    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    for number, task in enumerate(job.tasks, 1):
        started = time.perf_counter()
        target = Path(task.target)
        if target.is_dir():  # an earlier attempt got as far as this
            continue
        unscored = target.with_name(f".{target.name}.unscored")
        with tempfile.TemporaryDirectory() as work_dir:
            if task.samples is not None:
                if rank == 0:
                    shutil.rmtree(unscored, ignore_errors=True)
                    _save(_draw(job, task, work_dir), unscored)
                barrier()
            pairs = load_from_disk(str(unscored) if task.samples is not None else task.source)
            scored = reference_logps(job.base, pairs, job.dpo, work_dir, job.method) if len(pairs) else pairs
            if rank == 0:
                done = {"set": target.name, "pairs": len(scored), "workers": workers}
                with new_folder(target) as folder, (target.parent / "passes.jsonl").open("a") as file:
                    _save(scored, folder)
                    file.write(json.dumps({**done, "seconds": round(time.perf_counter() - started, 2)}) + "\n")
                report(number, len(job.tasks))
            barrier()
            if rank == 0:
                shutil.rmtree(unscored, ignore_errors=True)


def _draw(job: ReferenceJob, task: ScoringTask, work_dir: str) -> Dataset:
    from prefvec_ray.training.answers import base_answers

    limit = dpo_config(job.dpo, work_dir).max_length
    prompts = load_from_disk(task.source)
    count, quantize = task.samples or 0, job.method.quantize
    return base_answers(job.base, prompts, samples=count, tokens=task.tokens, max_length=limit, quantize=quantize)


def _save(pairs: Dataset, folder: Path) -> None:
    pairs.save_to_disk(folder, num_shards=None if len(pairs) else 1)  # an empty set without a shard cannot be read


def working_base(config: TrainingConfig) -> Path:
    """The base with the chat template that it is trained with: what to evaluate, search and serve with."""
    return config.folder / "base" if config.chat_template is not None else config.base.absolute()


def key_of(*parts: str | bytes) -> str:
    """Ten hex digits that stand for all the parts."""
    digest = blake3()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:10]

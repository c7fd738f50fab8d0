"""Reference log-probs (DPO, arXiv 2305.18290, eq. 7: pi_ref), once per base x data x tokenization, for all runs.

They lie under `<folder>/reference/`, where every run of this job and of later ones finds them, in both polarities: no
run holds a reference model. Each pass that was really made leaves a line in `passes.jsonl`.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from datasets import load_from_disk
from rich.console import Console

from prefvec_ray.common.paths import check_visible
from prefvec_ray.common.scheduling import Waiting, check_room
from prefvec_ray.training.config import Method, TrainingConfig
from prefvec_ray.training.model import load_tokenizer
from prefvec_ray.training.plan import RunsFailedError, slots, start_run, worker_setup
from prefvec_ray.training.progress import follow, job_board
from prefvec_ray.vectors import fingerprint

PARTS = {"train": "pairs", "test": "test_pairs"}
PAIRS_PER_WORKER = 4096
"""Below that another worker costs more to start than it saves."""


def compute_references(
    config: TrainingConfig, prepared: dict[str, dict[str, Any]], board: Any = None
) -> dict[str, dict[str, Any]]:
    """Reference log-probs of every split and of a few answers of the base itself, in one Ray Train run.

    A large data set is scored by as many workers as the cluster has free for it.

    Args:
        board: of `job_board`; one for this pass alone is made where it is left out.

    Returns:
        By preference: {"train": folder, "test": folder, "answers": folder, "digest"} of the tokenized pairs with
        reference columns; no "answers" where the config wants none.
    """
    if board is None:
        with job_board(config.folder) as board:
            return compute_references(config, prepared, board)
    base = fingerprint(config.base)
    tokenizer = load_tokenizer(working_base(config))
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    shape = {field: config.dpo.get(field) for field in ("max_length", "truncation_mode", "ld_alpha", "pad_token")}
    half = [config.dpo.get("bf16", config.resources.gpus_per_worker > 0), config.dpo.get("fp16", False)]
    if any(half):  # rounded in another way under DeepSpeed, and over a frozen base in bf16
        shape["half"] = [*half, config.deepspeed is not None, config.method]
    key = key_of(base, vocabulary, tokenizer.chat_template or "", json.dumps(shape))
    watch = config.watch
    references = {}
    wanted = []
    for name, split in prepared.items():
        folder = config.folder / "reference" / f"{Path(split['train']).parent.name}-{key}"
        references[name] = {part: str(folder / part) for part in PARTS} | {"digest": split["digest"]}
        wanted += [
            {"target": str(folder / part), "source": split[part], "pairs": split[count]}
            for part, count in PARTS.items()
        ]
        if watch.kl_samples >= 2:
            target = str(folder / f"answers-{watch.kl_samples}x{watch.kl_tokens}")
            references[name]["answers"] = target
            answers = {"samples": watch.kl_samples, "tokens": watch.kl_tokens}
            wanted.append({"target": target, "source": str(folder / "test"), "pairs": watch.kl_samples, **answers})
    missing = [task for task in wanted if not Path(task["target"]).is_dir()]
    if missing:
        method = config.run_method.model_dump()
        job = {"base": str(working_base(config)), "dpo": config.dpo, "method": method, "tasks": missing, "board": board}
        times = max(
            1, min(slots(config.resources, free=True), sum(task["pairs"] for task in missing) // PAIRS_PER_WORKER)
        )
        resources = config.resources.model_copy(update={"workers": config.resources.workers * times})
        check_room("the pass over the reference model", resources.bundles)
        name = f"reference-{key_of(*(task['target'] for task in missing))}"
        try:
            storage = config.folder / "ray"
            run = start_run(_reference_worker, job, name, resources, storage, retries=config.retries)
            console = Console(highlight=False)
            room = Waiting(console, "the pass over the reference model", resources.bundles)
            what = "sets of pairs with reference log-probs, once for all runs"
            follow(run, board, "reference", what, console, room)
        except RunsFailedError as error:
            raise RunsFailedError(f"reference log-probs failed, no run was started: {error}") from error
    return references


def _reference_worker(config: dict[str, Any]) -> None:
    """Body of a Ray Train worker."""
    sources = [task["source"] for task in config["tasks"] if "samples" not in task]
    check_visible(config["base"], *sources)
    worker_setup()
    board = config["board"]
    board.begin.remote("reference")

    def report(done: int, total: int) -> None:
        board.update.remote("reference", {"step": done, "total": total})

    write_references(config["base"], config["dpo"], config["method"], config["tasks"], report)


def write_references(
    base: str,
    dpo: dict[str, Any],
    method: dict[str, Any],
    tasks: list[dict[str, Any]],
    report: Callable[[int, int], None],
) -> None:
    """Score every set that is missing; each appears whole or not at all. Rank 0 calls `report(done, total)`."""
    import torch.distributed as dist

    from prefvec_ray.training.answers import base_answers
    from prefvec_ray.training.dpo import dpo_config, reference_logps

    checked = Method.model_validate(method)
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for number, task in enumerate(tasks, 1):
        started = time.perf_counter()
        target = Path(task["target"])
        if target.is_dir():  # an earlier attempt got as far as this
            continue
        source = task["source"]
        partial = target.with_name(f".{target.name}.partial")
        with tempfile.TemporaryDirectory() as work_dir:
            if "samples" in task:
                source = str(target.with_name(f".{target.name}.unscored"))
                if rank == 0:
                    limit = dpo_config(dpo, work_dir).max_length
                    test = load_from_disk(task["source"])
                    drawn = base_answers(base, test, samples=task["samples"], tokens=task["tokens"], max_length=limit)
                    shutil.rmtree(source, ignore_errors=True)
                    drawn.save_to_disk(source, num_shards=1)  # also where it is empty: no shard could not be read
                if dist.is_initialized():
                    dist.barrier()
            pairs = load_from_disk(source)
            scored = reference_logps(base, pairs, dpo, work_dir, checked) if len(pairs) else pairs
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                scored.save_to_disk(partial, num_shards=None if len(scored) else 1)
                done = {"set": target.name, "pairs": len(scored), "workers": workers}
                with (target.parent / "passes.jsonl").open("a") as file:
                    file.write(json.dumps({**done, "seconds": round(time.perf_counter() - started, 2)}) + "\n")
                partial.rename(target)
                report(number, len(tasks))
            if dist.is_initialized():
                dist.barrier()
            if "samples" in task and rank == 0:
                shutil.rmtree(source)


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

"""A search over coefficients on Ray Tune: an `Explorer` decides, trial actors measure, a file keeps what is known.

Every finished setting is a line of `trials.jsonl`, written before the next one is proposed. A search that was killed,
at any moment and in any way, is resumed from those lines when it is called again with the same folder: plain data,
where Tune's own snapshots are pickles that come every few seconds and hold one trial more or less than was paid for.
How a search ended is the last line, so that it ends in the same way, with the same result, when it is opened again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic_core import to_json

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.scorers.base import scorer_digest
from prefvec_ray.search.driver import run_trials
from prefvec_ray.search.explore import Explorer
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.options import SearchConfig
from prefvec_ray.search.progress import Progress
from prefvec_ray.search.result import SearchResult
from prefvec_ray.search.trial import Task


def search(
    task: Task, config: SearchConfig, folder: str | Path, *, progress: Callable[[Progress], None] | None = None
) -> SearchResult:
    """Search the coefficients of `task.vectors` for the Pareto front of objectives, metrics of the task's scorer.

    The base and the settings in `start` come first, then what Optuna's sampler or the grid proposes. Each setting is
    measured rung by rung, and dropped where another is better in every objective beyond doubt. Settings that break a
    limit are kept but never enter the front; the sampler gets by how much they break it. Where what was measured ends
    the search (patience, most settings fail), settings in flight are cancelled and count for nothing. Otherwise they
    are measured to the end. `SearchResult.stopped` is the reason for the end.

    A setting fails where the scorer raises, or scores NaN, where a rung takes longer than `timeout` (its process is
    killed), or where its process dies more than twice; it is listed in `failed`.

    `folder` keeps the trials and how the search ended. An interrupted search is resumed. One that ended returns the
    same result at once, unless it is asked for something else (more trials, another patience, other limits): then it
    decides anew from what was measured whether to continue. One that failures ended is tried again.
    The same seed and number of `actors` give the same search, however many of them the cluster has room for and
    whichever finishes first (`Ordered`); one that was interrupted may propose other settings after that. An active Ray
    connection is used, else Ray is started.

    Raises:
        InputError: a vector of another base, an unknown objective or limit, a range that does not contain 0, a budget
            that covers no setting, or a folder that holds another search.
        JobError: another process is searching into the folder; a trial process cannot be set up (a node does not see
            the base, the scorer cannot be built); nothing could be measured, or not the base, with the reason.
    """
    began = time.perf_counter()
    metrics, rungs = task.metrics, [sum(block.answers for block in blocks) for blocks in task.blocks(config.rungs)]
    config.goal(metrics)
    config.check(task.vectors, sum(rungs))
    task.check()
    task = replace(
        task,
        base=Path(task.base).absolute(),
        vectors={name: Path(vector).absolute() for name, vector in task.vectors.items()},
        base_fingerprint=check_vectors(task),
    )
    with Journal(Path(folder), _definition(task, config)) as journal:
        explorer = Explorer(config, metrics, task.vectors, rungs, known=journal.done, end=journal.end)
        end = explorer.final(journal.end.seconds if journal.end else 0.0)
        if end is None:
            run_trials(task, explorer, journal, progress, began)
            end = explorer.final(time.perf_counter() - began)
            if end is not None:
                journal.close_with(end)
    seconds = end.seconds if end else time.perf_counter() - began
    result = explorer.result(seconds=seconds, resumed=len(journal.done))
    if not result.has_base:
        first = f"; the first failure: {result.failed[0].error}" if result.failed else ""
        raise JobError(f"the search gave no result: {result.stopped}{first}")
    return result


def check_vectors(task: Task) -> str:
    """The base's fingerprint, after every vector was found to belong to it."""
    from prefvec_ray.vectors import fingerprint, load_vector

    expected = fingerprint(task.base)
    for name, folder in task.vectors.items():
        found = load_vector(folder).info.base_fingerprint
        if found != expected:
            raise InputError(
                f"vector {name!r} in {folder} belongs to base {found[:23]}…, {task.base} is {expected[:23]}…; "
                "use the base it was trained on"
            )
    return expected


def _definition(task: Task, config: SearchConfig) -> dict[str, Any]:
    """What makes two searches the same one. Limits and trial counts may change between runs: they alter no
    measurement."""
    from prefvec_ray.vectors import load_vector

    sampling = task.sampling
    # Searches without tasks are described as they were before there were any: their folders are still theirs.
    tasks = {"harness": [each.digest for each in task.harness]} if task.harness else {}
    prompts = to_json(task.prompts, fallback=lambda prompt: getattr(prompt, "text", repr(prompt)))
    return {
        "base": task.base_fingerprint,
        "vectors": {name: load_vector(folder).digest() for name, folder in task.vectors.items()},
        "prompts": blake3(prompts).hexdigest(),
        "sampling": [
            sampling.samples_per_prompt,
            sampling.temperature,
            sampling.max_new_tokens,
            sampling.seed,
            task.template,
        ],
        "rungs": list(config.rungs),
        "scorer": scorer_digest(task.load_scorer()),
        "measures": list(task.measures),
        "pairs": blake3(json.dumps(dict(task.pairs)).encode()).hexdigest(),
        "objectives": config.objectives,
        "metrics": {name: metric.model_dump() for name, metric in task.metrics.items()},
        "ranges": {name: list(bound) for name, bound in config.bounds(task.vectors).items()},
        "seed": config.seed,
        **tasks,
    }

"""The study in slices: here, without Ray, one run after the other, until a budget of time is spent. A later call
continues, in the middle of an epoch where need be.

A slice needs no more than torch, so that it runs on a machine that is lent for half an hour.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.errors import JobError
from prefvec_ray.common.files import read_json
from prefvec_ray.common.lines import LineWriter
from prefvec_ray.robustness.run_files import Budget, Pause, RunFiles
from prefvec_ray.robustness.study import Cell, Study, run_cell


@dataclass
class Slice:
    """What one slice came to."""

    finished: int = 0
    """Runs that it finished."""
    left: int = 0
    """Runs that are not finished yet, but for the failed ones."""
    under_way: str = ""
    """The run that it stopped in, and how far that is."""
    failed: dict[str, str] = field(default_factory=dict)
    """Runs that failed, name to reason; the next slice tries them again from their last epoch."""


def run_slice(study: Study, budget: Budget, progress: Callable[[str], None] | None = None) -> Slice:
    """Run what is missing of `study` until `budget` is spent: it ends after the batch, or the attack of an audit, that
    is under way then. At least one of these is done, so that any number of slices, however short, comes to an end.

    Every epoch is stored in the study's folder, in `checkpoints`; a slice that is killed loses the epoch under way.

    Raises:
        InputError: a checkpoint is damaged.
        JobError: another command is running the study.
    """
    found = Slice()
    report = progress or (lambda line: None)
    missing = study.missing
    with LineWriter(study.path, f"another command is running the study in {study.folder}; wait for it") as lines:
        for cell, seed in missing:
            name, files = f"{cell.name}, seed {seed}", files_of(study, cell, seed, budget)
            report(name)
            started, clock = time.monotonic(), files.folder / "seconds.json"
            earlier = read_json(clock)["seconds"] if clock.exists() else 0.0
            try:
                run = run_cell(study.config, cell, seed, files)
            except Pause as pause:
                write_whole(clock, f'{{"seconds": {earlier + time.monotonic() - started:.2f}}}')
                found.under_way = f"{name}: {pause}"
                break
            except JobError as error:
                found.failed[name] = str(error)
            else:
                run = run.model_copy(update={"seconds": round(earlier + run.seconds, 2)})
                lines.add(run.model_dump_json())
                study.runs.append(run)
                files.remove()
                found.finished += 1
            if budget.spent:
                break
    found.left = len(study.missing) - len(found.failed)
    return found


def files_of(study: Study, cell: Cell, seed: int, budget: Budget) -> RunFiles:
    """Where a run of the study is stored while it is under way."""
    digest = hashlib.sha256(cell.model_dump_json().encode()).hexdigest()[:16]
    return RunFiles(study.folder / "checkpoints" / f"{digest}-{seed}", budget)

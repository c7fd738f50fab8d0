"""What a training job is doing, for other terminals: a small file in its folder, and another one that ends the job.

Both need only the folder: no connection to the cluster, which may be one that the job started for itself.
"""

import _thread
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import JsonValue

from prefvec_ray.artifacts.training import Artifact, RunSpec
from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import read_model
from prefvec_ray.training.checkpoints import checkpoint_folder, newest_checkpoint

STATUS, CANCEL = "status.json", "cancel"
EVERY = 2.0
"""seconds between two looks at the board and for a cancellation"""
SILENT = 60.0
"""seconds after which a job that has written nothing counts as gone: its process was killed, or its machine is down"""


class JobStatus(Artifact):
    """`status.json`."""

    at: float
    """When it was written: seconds since 1970, by the clock of `host`."""
    host: str
    pid: int
    ended: str = ""
    """Why the job is over; empty while it works."""
    runs: list[RunSpec] = []
    """Empty until the runs are planned."""
    rows: dict[str, dict[str, JsonValue]] = {}
    """The board's figures, by run or earlier stage."""

    @property
    def alive(self) -> bool:
        return not self.ended and time.time() - self.at < SILENT

    def state(self, run: RunSpec, workers: int) -> str:
        """`finished`, `failed`, `running`, `queued`, or `stopped` with the step that `workers` processes would continue
        from."""
        if run.is_finished:
            return "finished"
        row = self.rows.get(run.label)
        if row is not None and "failed" in row:
            return "failed"
        if self.alive:
            return "queued" if row is None else "running"
        found = newest_checkpoint(checkpoint_folder(run.out), workers)
        return f"stopped, continues from step {found[1]}" if found else "stopped, begins anew"


class StatusFile:
    """Keeps `status.json` up to date from a thread, and interrupts the main thread where the job is to be cancelled."""

    def __init__(self, folder: Path, board: Any) -> None:
        self._folder, self._board = folder, board
        self._runs: list[RunSpec] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.cancelled = False

    def plan(self, runs: list[RunSpec]) -> None:
        """The runs are known now."""
        self._runs = list(runs)

    def begin(self) -> None:
        (self._folder / CANCEL).unlink(missing_ok=True)  # asked of a job that was over by then
        self._write()
        self._thread.start()

    def end(self, reason: str) -> None:
        self._over.set()
        self._thread.join()
        self._write(reason)

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            with suppress(ray.exceptions.RayError):  # the board was lost: the runs continue without it
                self._rows = ray.get(self._board.read.remote(), timeout=10)
            with suppress(OSError):  # the disk may be full for a while
                self._write()
            if not self.cancelled and (self._folder / CANCEL).exists():
                self.cancelled = True
                _thread.interrupt_main()

    def _write(self, ended: str = "") -> None:
        status = JobStatus(
            at=time.time(), host=platform.node(), pid=os.getpid(), ended=ended, runs=self._runs, rows=self._rows
        )
        write_whole(self._folder / STATUS, status.model_dump_json())


@contextmanager
def job_status(folder: Path, board: Any) -> Iterator[StatusFile]:
    """Report the job that trains into `folder` while the block runs.

    Raises:
        JobError: somebody called `cancel`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status = StatusFile(folder, board)
    status.begin()
    reason = "finished"
    try:
        yield status
    except KeyboardInterrupt as error:
        reason = "cancelled" if status.cancelled else "interrupted"
        if not status.cancelled:
            raise
        raise JobError(
            "cancelled from another terminal; what is finished is kept, and the same command continues from there"
        ) from error
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        status.end(reason)


def read_status(folder: Path) -> JobStatus:
    """What the job in `folder` reported last. InputError where none has begun there."""
    if not (folder / STATUS).is_file():
        raise InputError(f"{folder}: no training has begun there; start it with `prefvec train`")
    return read_model(folder / STATUS, JobStatus, "it is written anew by the next `prefvec train`")


def cancel(folder: Path, *, patience: float = 60.0) -> JobStatus:
    """End the job in `folder`, and wait until it has ended. What is finished, and every checkpoint, is kept.

    Raises:
        InputError: none is running there.
        JobError: it has not ended within `patience` seconds.
    """
    status = read_status(folder)
    if not status.alive:
        since = f"it ended: {status.ended}" if status.ended else f"process {status.pid} on {status.host} is gone"
        raise InputError(f"{folder}: no training is running there; {since}")
    (folder / CANCEL).touch()
    until = time.monotonic() + patience
    while (status := read_status(folder)).alive:
        if time.monotonic() > until:
            raise JobError(f"process {status.pid} on {status.host} has not ended after {patience:.0f} s; end it there")
        time.sleep(0.2)
    return status

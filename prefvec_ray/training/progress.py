"""Many runs, one table: workers report their progress to a board actor, the driver draws it.

On a terminal the table is live; in a job's log it becomes a line a run for each measurement, and now and then one for
all of them.
"""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from blake3 import blake3
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.live import Live
from rich.table import Table

from prefvec_ray.common.cluster import NAMESPACE, progress_bar
from prefvec_ray.common.errors import JobError
from prefvec_ray.common.scheduling import Waiting

COLUMNS = ("run", "state", "step", "loss", "margin", "acc", "held out", "KL", "Δ chosen", "|grad|", "tok/s", "left")
NARROW = ("run", "state", "step", "loss", "held out", "left")
"""What a terminal of 80 columns shows."""

LONGEST_SILENCE = 600.0

T = TypeVar("T")


@dataclass
class TaskList:
    """What one worker group was given."""

    given: dict[int, bytes | None] = field(default_factory=dict)
    ended: int = 0
    since: float = 0.0
    """When its first worker was up."""


class Board:
    """The latest figures of every run, and the tasks of every worker group.

    Small on purpose: losing it loses no work.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[int, str]] = {}
        self.tasks: dict[str, TaskList] = defaultdict(TaskList)
        self.changed = asyncio.Condition()

    def begin_tasks(self, group: str) -> int:
        """A worker of `group` is up. How many of its tasks were ended before."""
        tasks = self.tasks[group]
        tasks.since = tasks.since or time.monotonic()
        return tasks.ended

    async def give(self, group: str, number: int, task: bytes | None) -> None:
        """Task `number` of a group, from 1; None: there are no more."""
        async with self.changed:
            self.tasks[group].given[number] = task
            self.changed.notify_all()

    async def task(self, group: str, number: int) -> bytes | None:
        """Task `number` of a group, as soon as it is given."""
        given = self.tasks[group].given
        async with self.changed:
            await self.changed.wait_for(lambda: number in given)
        return given[number]

    async def end(self, group: str, number: int) -> None:
        """The group has ended its task `number`."""
        async with self.changed:
            self.tasks[group].ended = number
            self.changed.notify_all()

    async def ended(self, group: str, number: int) -> float:
        """Waits until the group has ended its task `number`. The seconds since its first worker was up."""
        tasks = self.tasks[group]
        async with self.changed:
            await self.changed.wait_for(lambda: tasks.ended >= number)
        return time.monotonic() - tasks.since

    def place(self, key: str, rank: int, node: str) -> None:
        """A worker of run `key` is up, on this node."""
        self.begin(key)
        self.nodes.setdefault(key, {})[rank] = node

    def places(self, key: str) -> dict[int, str]:
        """Rank -> node of the workers of run `key`, as reported last."""
        return self.nodes.get(key, {})

    def begin(self, key: str) -> None:
        """A process of the run is up: it no longer waits for room."""
        self.rows.setdefault(key, {})

    def update(self, key: str, values: dict[str, Any]) -> None:
        row = self.rows.setdefault(key, {})
        if values["step"] < row.get("step", 0) or "first" not in row:
            # Steps are timed from the first one seen, so that start-up, or a restart, does not count as slow training.
            row["first"] = (time.monotonic(), values["step"])
        row.update(values, seen=time.monotonic())

    def fail(self, key: str, reason: str) -> None:
        """The run has failed for good."""
        self.rows.setdefault(key, {})["failed"] = reason

    def read(self) -> dict[str, dict[str, Any]]:
        rows = {}
        for key, row in self.rows.items():
            eta = None
            if "first" in row and "total" in row:
                since, first = row["first"]
                done = row["step"] - first
                if done > 0:
                    eta = (row["total"] - row["step"]) * (row["seen"] - since) / done
            rows[key] = {**{k: v for k, v in row.items() if k not in ("first", "seen")}, "eta": eta}
        return rows


@contextmanager
def job_board(folder: Path, *, patience: float = 30) -> Iterator[Any]:
    """The board actor of the one job that trains into `folder`; it takes no CPU, and dies with its driver.

    It is on the driver's node: elsewhere a lost node would take the progress of all runs with it. Its name is the lock:
    two jobs that trained the same runs would write over each other.

    Args:
        patience: seconds to wait for the board of a driver that was killed, until Ray has noticed.

    Raises:
        JobError: another job of this cluster is training into the folder.
    """
    name = f"training-{blake3(str(folder.resolve()).encode()).hexdigest()[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Board).options(name=name, namespace=NAMESPACE, scheduling_strategy=here)
    until = time.monotonic() + patience
    while True:
        try:
            board = actor.remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > until:
                raise JobError(
                    f"another job of this cluster is training into {folder}: wait for it, or choose another name"
                ) from error
            time.sleep(0.5)
    try:
        yield board
    finally:
        ray.kill(board)


def follow(work: Future[T], board: Any, key: str, what: str, console: Console, waiting: Waiting | None = None) -> T:
    """The result of `work`; until it is there, a bar of `what` follows the steps of row `key` on the board.

    Until the row is there the work has not begun, and `waiting` reports what it waits for.
    """
    shown = 0
    with progress_bar(console, what) as show:
        while not wait([work], timeout=0.5).done:
            with suppress(ray.exceptions.RayActorError):  # the board's node was lost: the work continues without it
                row = ray.get(board.read.remote()).get(key)
                if waiting is not None:
                    waiting.poll(started=row is not None)
                if row and row.get("step", shown) != shown:
                    show(shown := row["step"], row["total"])
    return work.result()


class ProgressTable:
    """The table of all runs: state, step, figures, time left. Use as a context manager and `update` it.

    Args:
        names: the runs, in the order of the rows.
        interval: seconds from one line on all runs to the next where the output is no terminal; it doubles each time
            until ten minutes, so that a job of a day leaves some hundred of them.
    """

    def __init__(
        self, names: Iterable[str], *, title: str, interval: float = 10, console: Console | None = None
    ) -> None:
        self.names = list(names)
        self.states = dict.fromkeys(self.names, "queued")
        self.reasons: dict[str, str] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, int] = {}
        self.title = title
        self.interval = interval
        self.console = console or Console(file=sys.stdout)
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.next_line = 0.0

    def __enter__(self) -> "ProgressTable":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.update(self.render())
            self.live.stop()
        else:
            self.console.print(self.render())
        for name, reason in self.reasons.items():
            self.say(f"{name} {self.states[name]}: {reason}")

    def update(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        for name in rows:
            if self.states.get(name) == "queued":
                self.states[name] = "running"
        if self.live:
            self.live.update(self.render())
            return
        for name, row in rows.items():
            measured = max((point["step"] for point in row.get("held_out", {}).values()), default=-1)
            if measured > self.measured.get(name, -1):
                self.measured[name] = measured
                self.say(f"{name}: {self._details(name)}")
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.interval
            self.interval = min(2 * self.interval, LONGEST_SILENCE)
            self.say(self._summary())

    def finish(self, name: str, state: str, reason: str = "") -> None:
        """A run has ended; `reason`: why, where it failed."""
        self.states[name] = state
        if reason:
            self.reasons[name] = reason
        if self.live:
            self.live.update(self.render())
        elif reason:
            self.say(f"{name} {state}: {reason}")

    def say(self, line: str) -> None:
        """Print a line: above the table on a terminal."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _cells(self, name: str) -> list[str]:
        row = self.rows.get(name, {})

        def figure(key: str, form: str) -> str:
            return format(row[key], form) if row.get(key) is not None else ""

        held_out = " ".join(f"{measured['accuracy']:.2f}" for measured in row.get("held_out", {}).values())
        step = f"{row['step']}/{row['total']}" if "step" in row else ""
        left = duration(row["eta"]) if row.get("eta") and self.states[name] == "running" else ""
        return [
            name,
            self.states[name],
            step,
            figure("loss", ".4f"),
            figure("margin", "+.3f"),
            figure("accuracy", ".2f"),
            held_out,
            figure("kl", ".3f"),
            figure("chosen_shift", "+.2f"),
            figure("grad_norm", ".2g"),
            figure("tokens_per_s", ",.0f"),
            left,
        ]

    def _details(self, name: str) -> str:
        cells = dict(zip(COLUMNS, self._cells(name), strict=True))
        return ", ".join(f"{column} {text}" for column, text in cells.items() if text and column not in COLUMNS[:2])

    def render(self) -> Table:
        """The table as it is now."""
        columns = COLUMNS if self.console.width >= 110 else NARROW
        table = Table(title=self.title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
        for name in self.names:
            cells = dict(zip(COLUMNS, self._cells(name), strict=True))
            table.add_row(*(cells[column] for column in columns))
        return table

    def _summary(self) -> str:
        states = list(self.states.values())
        count = {state: states.count(state) for state in ("finished", "running", "queued", "failed")}
        parts = [f"{number} {state}" for state, number in count.items() if number]
        for name, state in self.states.items():
            if state == "running":
                cells = dict(zip(COLUMNS, self._cells(name), strict=True))
                parts.append(f"{name} {cells['step']}" + (f" ({cells['left']} left)" if cells["left"] else ""))
        return f"{self.title}: " + " | ".join(parts)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

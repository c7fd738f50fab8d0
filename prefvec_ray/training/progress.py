"""Many runs, one table: workers tell a board actor where they are, the driver draws it.

On a terminal the table is live; in a job's log it becomes one line every few seconds.
"""

import sys
import time
from collections.abc import Iterable
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.table import Table


class Board:
    """The latest word of every run. Small on purpose: losing it loses no work."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def update(self, key: str, values: dict[str, Any]) -> None:
        row = self.rows.setdefault(key, {})
        if values["step"] < row.get("step", 0) or "first" not in row:
            # Steps are timed from the first one seen, so that start-up, or a restart, does not count as slow training.
            row["first"] = (time.monotonic(), values["step"])
        row.update(values, seen=time.monotonic())

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


def start_board() -> Any:
    """A board actor of this job; it takes no CPU."""
    return ray.remote(num_cpus=0)(Board).remote()


class ProgressTable:
    """The table of all runs: state, step, loss, accuracy, time left. Use as a context manager and `update` it.

    Args:
        names: the runs, in the order of the rows.
        interval: seconds between two lines where the output is no terminal.
    """

    def __init__(
        self, names: Iterable[str], *, title: str, interval: float = 10, console: Console | None = None
    ) -> None:
        self.names = list(names)
        self.states = dict.fromkeys(self.names, "queued")
        self.rows: dict[str, dict[str, Any]] = {}
        self.title = title
        self.interval = interval
        self.console = console or Console(file=sys.stdout)
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.last_line = 0.0

    def __enter__(self) -> "ProgressTable":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._draw(final=True)
        if self.live:
            self.live.stop()

    def update(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        for name in rows:
            if self.states.get(name) == "queued":
                self.states[name] = "running"
        self._draw()

    def finish(self, name: str, state: str) -> None:
        self.states[name] = state
        self._draw()

    def _draw(self, *, final: bool = False) -> None:
        if self.live:
            self.live.update(self._table())
        elif final:
            self.console.print(self._table())
        elif time.monotonic() - self.last_line >= self.interval:
            self.last_line = time.monotonic()
            self.console.print(self._line(), soft_wrap=True)

    def _cells(self, name: str) -> list[str]:
        row = self.rows.get(name, {})
        step = f"{row['step']}/{row['total']}" if "step" in row else ""
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        accuracy = f"{row['accuracy']:.2f}" if "accuracy" in row else ""
        eta = f"{row['eta']:.0f} s" if row.get("eta") and self.states[name] == "running" else ""
        return [name, self.states[name], step, loss, accuracy, eta]

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in ("run", "state", "step", "loss", "accuracy", "time left"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
        for name in self.names:
            table.add_row(*self._cells(name))
        return table

    def _line(self) -> str:
        count = {
            state: list(self.states.values()).count(state) for state in ("finished", "running", "queued", "failed")
        }
        parts = [f"{number} {state}" for state, number in count.items() if number]
        for name, state in self.states.items():
            if state == "running":
                _, _, step, loss, accuracy, eta = self._cells(name)
                detail = [
                    step,
                    f"loss {loss}" if loss else "",
                    f"acc {accuracy}" if accuracy else "",
                    eta and f"{eta} left",
                ]
                parts.append(f"{name} " + " ".join(item for item in detail if item))
        return f"{self.title}: " + " | ".join(parts)

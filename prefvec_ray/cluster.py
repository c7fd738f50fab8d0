"""Joining a Ray cluster, or starting one on this machine; and bars that behave on terminals and in job logs."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ray.exceptions import RayError

NAMESPACE = "prefvec"


def connect(console: Console) -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one here; once a process."""
    import ray

    from prefvec_ray.serving import guard

    if ray.is_initialized():
        return
    # Workers inherit these: Ray Train's print patch writes a line for every line, and forked tokenizers warn. Serve's
    # proxy, where it is to run, looks at headers first.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(guard.SETTING, guard.PATH)
    context = ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    resources = ray.cluster_resources()
    gpus = f" and {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    where = context.dashboard_url or "off"
    console.print(f"   [dim]Ray cluster with {resources.get('CPU', 0):g} CPUs{gpus}, dashboard {where}[/dim]")


def reason(error: "RayError") -> str:
    """In a line, why a task or an actor failed: what its own code raised, else what Ray says first."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:1000]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no word why"]
    # Of an actor that could not be made Ray shows the traceback: the reason is at its end.
    return f"{type(error).__name__}: {lines[-1 if 'creation task' in lines[0] else 0]}"


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to tell (done, total): a bar on a terminal, a line every ten seconds elsewhere."""
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.monotonic() - last > 10:
                last = time.monotonic()
                console.print(f"   {done}/{total} {what}")

        yield line
        return
    columns = TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)

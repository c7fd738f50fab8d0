"""Where a running search stands, and how a console shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from prefvec_ray.search.result import FailedTrial


@dataclass(frozen=True)
class Progress:
    """Where a running search stands, after each setting that was measured, dropped or failed."""

    done: int
    trials: int
    dropped: int
    failed: int
    answers: int
    front: int
    hypervolume: float
    seconds: float
    failure: FailedTrial | None = None
    """The setting that has just failed, and why; None where one was measured or dropped."""

    def __str__(self) -> str:
        dropped = f", {self.dropped} of them dropped early" if self.dropped else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"search: {self.done}/{self.trials} settings{dropped}{failed}, {self.answers} answers, "
            f"{self.front} on the front, hypervolume {self.hypervolume:.4f}, {self.seconds:.0f} s"
            + (f"; {self.failure}" if self.failure else "")
        )


def show_progress(console: Console, bar: Callable[[int, int], None]) -> Callable[[Progress], None]:
    """A `progress` for `search`: a failing setting is printed at once; only measured and dropped ones move the bar.

    Args:
        bar: called with (done, total), as `progress_bar` gives it.
    """

    def show(now: Progress) -> None:
        if now.failure:
            console.print(str(now.failure), style="red", markup=False, highlight=False, soft_wrap=True)
        bar(now.done, now.trials)

    return show

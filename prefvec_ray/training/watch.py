"""What is measured of a run while it trains, and the two reasons for which it is stopped.

A run is measured on held-out pairs of its preference, never flipped, and on answers that the base itself gave. From the
second comes KL(base || run) = E_{y ~ base}[log base(y) - log run(y)], in nats an answer of at most `kl_tokens` tokens:
answers and their base log-probs are drawn once for all runs, so that it costs one forward pass over a few answers, no
generation and no model beside the one that trains. The estimate is unbiased; its standard error is about
sqrt(2 KL / samples), so it shows the size of a drift and not its second digit.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from prefvec_ray.artifacts.training import Drift, HeldOutPoint, Polarity, TrainingPoint
from prefvec_ray.common.errors import JobError

Report = Callable[[dict[str, Any]], None]

BASE_ANSWERS = "base.answers"
"""The set of held-out answers drawn from the base; no preference can have a name with a dot."""


class RunStoppedError(JobError):
    """A run diverged or learned the wrong direction; it publishes nothing, and its checkpoints are removed."""


class Clock:
    """Seconds of a run: in steps, in watching, in checkpoints."""

    def __init__(self) -> None:
        self.start = self.mark = time.perf_counter()
        self.away = {"watching": 0.0, "checkpoints": 0.0}
        self.steps = True
        self.away_then = 0.0
        self.tokens_then = 0.0

    @contextmanager
    def spent_on(self, what: Literal["watching", "checkpoints"]) -> Iterator[None]:
        outermost, self.steps = self.steps, False  # an evaluation of several sets is one of each set inside
        start = time.perf_counter()
        try:
            yield
        finally:
            self.steps = outermost
            if outermost:
                self.away[what] += time.perf_counter() - start

    def tokens_per_second(self, tokens: float) -> float:
        """Tokens a second since the last call, prompt and both answers, all ranks; watching and checkpoints aside."""
        now, away = time.perf_counter(), sum(self.away.values())
        seconds = (now - self.mark) - (away - self.away_then)
        rate = (tokens - self.tokens_then) / max(seconds, 1e-9)
        self.mark, self.away_then, self.tokens_then = now, away, tokens
        return rate

    def seconds(self) -> dict[str, float]:
        """{"steps", "watching", "checkpoints"} since the clock was made."""
        steps = time.perf_counter() - self.start - sum(self.away.values())
        return {name: round(value, 2) for name, value in {"steps": steps, **self.away}.items()}


def peak_memory() -> int:
    """Bytes: the most that this process held on its GPU, or without one its largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on: a process may train several runs, one after the other."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # a system that cannot: the peak is of all runs of the process
            Path("/proc/self/clear_refs").write_text("5")


def whole_batches(pairs: Dataset, batch: int) -> Dataset:
    """As many pairs as fill whole batches, or all of them where they fill not even one.

    TRL averages its figures over batches, all alike, and fills up the last one on several workers: only with whole
    batches is that the average over pairs.
    """
    return pairs.select(range(len(pairs) - len(pairs) % batch)) if len(pairs) >= batch else pairs


def few(pairs: Dataset, count: int, batch: int) -> Dataset:
    """`count` of the pairs at most, the same ones for every run, in whole batches."""
    return whole_batches(pairs.shuffle(seed=0).select(range(min(max(count, batch), len(pairs)))), batch)


def training_log(log: dict[str, float], beta: float) -> TrainingPoint:
    """What the trainer logs between two points. The gradient norm is NaN where it logs none."""
    return TrainingPoint(
        step=int(log["step"]),
        loss=log["loss"],
        accuracy=log["rewards/accuracies"],
        margin=log["rewards/margins"],
        chosen_shift=log["rewards/chosen"] / beta if beta else 0.0,
        grad_norm=log.get("grad_norm", math.nan),
        tokens_per_s=round(log["tokens_per_s"], 1),
        memory=int(log["memory"]),
    )


def held_out_log(log: dict[str, float], name: str, beta: float, pairs: int) -> HeldOutPoint:
    """What the trainer logs of a measurement on the held-out pairs of the preference `name`."""
    prefix = f"eval_{name}"
    return HeldOutPoint(
        step=int(log["step"]),
        accuracy=log[f"{prefix}/rewards/accuracies"],
        margin=log[f"{prefix}/rewards/margins"],
        loss=log[f"{prefix}_loss"],
        pairs=pairs,
        chosen_shift=log[f"{prefix}/rewards/chosen"] / beta if beta else 0.0,
        rejected_shift=log[f"{prefix}/rewards/rejected"] / beta if beta else 0.0,
    )


def kl_to_base(log: dict[str, float], beta: float) -> float | None:
    """KL(base || run) in nats an answer, from rewards beta (log run - log base) of two answers of the base a prompt."""
    rewards = [log[f"eval_{BASE_ANSWERS}/rewards/{answer}"] for answer in ("chosen", "rejected")]
    return -sum(rewards) / (2 * beta) if beta else None


def wrong_way(point: HeldOutPoint, polarity: Polarity, sigmas: float) -> bool:
    """Whether held-out accuracy is on the wrong side of 0.5 by more than noise, and the mean margin with it.

    Noise is `sigmas` standard errors of a fair coin thrown once a pair, sqrt(0.25 / pairs); at 3 of them fewer than ten
    pairs can never be enough. A run that has not moved has margin 0, and is not wrong.
    """
    sign = 1 if polarity == "positive" else -1
    noise = sigmas * math.sqrt(0.25 / point.pairs)
    return sign * (0.5 - point.accuracy) > noise and sign * point.margin < 0


@dataclass(eq=False)
class Watcher(TrainerCallback):
    """Reports how far a run is, and stops it for a figure that is not finite or for the wrong direction."""

    report: Report
    """Gets {"step", "total"} at most twice a second, and every figure as it is measured."""
    beta: float
    preference: str
    """Its held-out accuracy has to move in the direction of `polarity`. In a run on mixed data this is the name of no
    held-out set: preferences may conflict, and none of them has to gain."""
    polarity: Polarity
    sigmas: float | None
    """What counts as noise, see `wrong_way`; None: the run is not stopped for its direction."""
    pairs: dict[str, int]
    """Size of each held-out set."""
    patience: int = 2
    """Measurements in the wrong direction, one after the other, that stop the run."""
    last: float = 0.0
    """When the step was reported last."""

    def held_out(self, log: list[dict[str, float]]) -> dict[str, list[HeldOutPoint]]:
        """The measurements in what the trainer logged, by held-out set."""
        return {
            name: [held_out_log(entry, name, self.beta, pairs) for entry in log if f"eval_{name}_loss" in entry]
            for name, pairs in self.pairs.items()
            if name != BASE_ANSWERS
        }

    def drift(self, log: list[dict[str, float]]) -> list[Drift]:
        """The measurements on answers of the base."""
        entries = [entry for entry in log if f"eval_{BASE_ANSWERS}_loss" in entry]
        return [Drift(step=int(entry["step"]), kl=kl_to_base(entry, self.beta)) for entry in entries]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.report({"step": state.global_step, "total": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        log = {**(logs or {}), "step": state.global_step}
        figures: dict[str, Any] = {}
        if "loss" in log:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(log.get(name, 0.0)):
                    raise RunStoppedError(f"{name} is {log[name]} at step {state.global_step}: lower learning_rate")
            figures = training_log(log, self.beta).model_dump()
        for name, pairs in self.pairs.items():
            if f"eval_{name}_loss" not in log:
                continue
            if not math.isfinite(log[f"eval_{name}_loss"]):  # after the last step no training loss would show it
                raise RunStoppedError(f"held-out loss is not finite at step {state.global_step}: lower learning_rate")
            if name == BASE_ANSWERS:
                figures["kl"] = kl_to_base(log, self.beta)
            else:
                point = held_out_log(log, name, self.beta, pairs).model_dump()
                figures["held_out"] = {**figures.get("held_out", {}), name: point}
        if figures and state.is_world_process_zero:
            self.report({"total": state.max_steps, **figures, "step": state.global_step})
        if self.sigmas and f"eval_{self.preference}_loss" in log:
            self._check_direction(self.held_out(state.log_history)[self.preference][-self.patience :], self.sigmas)

    def _check_direction(self, last: list[HeldOutPoint], sigmas: float) -> None:
        if len(last) == self.patience and all(wrong_way(point, self.polarity, sigmas) for point in last):
            seen = ", then ".join(f"{point.accuracy:.2f}" for point in last)
            raise RunStoppedError(
                f"held-out accuracy {seen} on {last[-1].pairs} pairs at step {last[-1].step}: the wrong way "
                f"for a {self.polarity} run, beyond noise ({sigmas:g} standard errors); check which answer "
                "the data prefers, and learning_rate"
            )


def tensorboard(folder: str, resumed_at: int | None) -> TrainerCallback:
    """The writer of a run's event files; what an interrupted run wrote after its checkpoint is purged."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1))

"""What is seen of a run while it trains, and the two reasons for which it is stopped.

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
from contextlib import contextmanager
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from prefvec_ray.common.errors import JobError

Report = Callable[[dict[str, Any]], None]

BASE_ANSWERS = "base.answers"
"""The set of held-out answers drawn from the base; no preference can have a name with a dot."""


class RunStoppedError(JobError):
    """A run went where no vector can come from; it publishes nothing, and its checkpoints are removed."""


class Clock:
    """Where the time of a run goes: steps, watching, checkpoints."""

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


def whole_batches(pairs: Dataset, batch: int) -> Dataset:
    """As many pairs as fill whole batches, or all of them where they fill not even one.

    TRL averages its figures over batches, all alike, and fills up the last one on several workers: only with whole
    batches is that the average over pairs.
    """
    return pairs.select(range(len(pairs) - len(pairs) % batch)) if len(pairs) >= batch else pairs


def few(pairs: Dataset, count: int, batch: int) -> Dataset:
    """`count` of the pairs at most, the same ones for every run, in whole batches."""
    return whole_batches(pairs.shuffle(seed=0).select(range(min(max(count, batch), len(pairs)))), batch)


def training_log(log: dict[str, float], beta: float) -> dict[str, float]:
    """One entry of run.json's `history`, from what the trainer logs between two points.

    `loss`, `accuracy` and `margin` of training pairs (flipped in a negative run), `grad_norm`, `tokens_per_s`,
    `memory` in bytes, and `chosen_shift`: by how many nats the log-prob of the answer that this run prefers has moved
    from the base's. It often falls although the margin grows (displacement).
    """
    return {
        "step": log["step"],
        "loss": log["loss"],
        "accuracy": log["rewards/accuracies"],
        "margin": log["rewards/margins"],
        "chosen_shift": log["rewards/chosen"] / beta if beta else 0.0,
        "grad_norm": log.get("grad_norm", float("nan")),
        "tokens_per_s": round(log["tokens_per_s"], 1),
        "memory": log["memory"],
    }


def held_out_log(log: dict[str, float], name: str, beta: float, pairs: int) -> dict[str, float]:
    """One entry of run.json's `watched`: figures on held-out pairs of the preference `name`, never flipped.

    `chosen_shift` and `rejected_shift` are in nats, as in `training_log`.
    """
    prefix = f"eval_{name}"
    shifts = {
        f"{answer}_shift": log[f"{prefix}/rewards/{answer}"] / beta if beta else 0.0
        for answer in ("chosen", "rejected")
    }
    return {
        "step": log["step"],
        "accuracy": log[f"{prefix}/rewards/accuracies"],
        "margin": log[f"{prefix}/rewards/margins"],
        "loss": log[f"{prefix}_loss"],
        "pairs": pairs,
        **shifts,
    }


def kl_to_base(log: dict[str, float], beta: float) -> float | None:
    """KL(base || run) in nats an answer, from rewards beta (log run - log base) of two answers of the base a prompt."""
    rewards = [log[f"eval_{BASE_ANSWERS}/rewards/{answer}"] for answer in ("chosen", "rejected")]
    return -sum(rewards) / (2 * beta) if beta else None


def wrong_way(held_out: dict[str, float], polarity: str, sigmas: float) -> bool:
    """Whether held-out accuracy is on the wrong side of 0.5 by more than noise, and the mean margin with it.

    Noise is `sigmas` standard errors of a fair coin thrown once a pair, sqrt(0.25 / pairs); at 3 of them fewer than ten
    pairs can never be enough. A run that has not moved has margin 0, and is not wrong.
    """
    sign = 1 if polarity == "positive" else -1
    noise = sigmas * math.sqrt(0.25 / held_out["pairs"])
    return sign * (0.5 - held_out["accuracy"]) > noise and sign * held_out["margin"] < 0


class Watcher(TrainerCallback):
    """Tells the board where a run is, and stops it for a figure that is not finite or for the wrong direction.

    Args:
        report: gets {"step", "total"} at most twice a second, and every figure as it is measured.
        preference: whose held-out accuracy has to move in the direction of `polarity`. In a run on mixed data it is the
            name of no held-out set: preferences may conflict, and none of them has to gain.
        sigmas: what counts as noise, see `wrong_way`; None: the run is not stopped for its direction.
        watched: the held-out sets.
    """

    def __init__(
        self,
        report: Report,
        beta: float,
        preference: str,
        polarity: str,
        sigmas: float | None,
        watched: dict[str, Dataset],
    ) -> None:
        self.report = report
        self.beta = beta
        self.preference = preference
        self.polarity = polarity
        self.sigmas = sigmas
        self.pairs = {name: len(pairs) for name, pairs in watched.items()}
        self.patience = 2
        self.last = 0.0

    def watch_the_end(self, full: dict[str, Dataset]) -> None:
        """From now on measurements are made on all held-out pairs, and one is enough to stop the run."""
        self.pairs = {name: len(pairs) for name, pairs in full.items()}
        self.patience = 1

    def history(self, log: list[dict[str, float]]) -> dict[str, list[dict[str, Any]]]:
        """run.json's `watched`, from what the trainer logged: entries by held-out set, and `kl`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, pairs in self.pairs.items():
            entries = [entry for entry in log if f"eval_{name}_loss" in entry]
            if name == BASE_ANSWERS:
                found["kl"] = [{"step": entry["step"], "kl": kl_to_base(entry, self.beta)} for entry in entries]
            else:
                found[name] = [held_out_log(entry, name, self.beta, pairs) for entry in entries]
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.report({"step": state.global_step, "total": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        log = {**(logs or {}), "step": state.global_step}
        tell: dict[str, Any] = {}
        if "loss" in log:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(log.get(name, 0.0)):
                    raise RunStoppedError(f"{name} is {log[name]} at step {state.global_step}: lower learning_rate")
            tell = training_log(log, self.beta)
        for name, pairs in self.pairs.items():
            if f"eval_{name}_loss" not in log:
                continue
            if not math.isfinite(log[f"eval_{name}_loss"]):  # after the last step no training loss would show it
                raise RunStoppedError(f"held-out loss is not finite at step {state.global_step}: lower learning_rate")
            if name == BASE_ANSWERS:
                tell["kl"] = kl_to_base(log, self.beta)
            else:
                tell["held_out"] = {**tell.get("held_out", {}), name: held_out_log(log, name, self.beta, pairs)}
        if tell and state.is_world_process_zero:
            self.report({"total": state.max_steps, **tell, "step": state.global_step})
        if self.sigmas and f"eval_{self.preference}_loss" in log:
            self._check_direction(self.history(state.log_history)[self.preference][-self.patience :], self.sigmas)

    def _check_direction(self, last: list[dict[str, Any]], sigmas: float) -> None:
        if len(last) == self.patience and all(wrong_way(point, self.polarity, sigmas) for point in last):
            seen = ", then ".join(f"{point['accuracy']:.2f}" for point in last)
            raise RunStoppedError(
                f"held-out accuracy {seen} on {last[-1]['pairs']} pairs at step {last[-1]['step']}: the wrong way "
                f"for a {self.polarity} run, beyond noise ({sigmas:g} standard errors); check which answer "
                "the data prefers, and learning_rate"
            )


def tensorboard(folder: str, resumed_at: int | None) -> TrainerCallback:
    """The writer of a run's event files; what an interrupted run wrote after its checkpoint is purged."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1))

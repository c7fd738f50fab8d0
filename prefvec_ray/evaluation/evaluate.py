"""One setting of the coefficients, measured: sampled answers, scored, with standard errors over prompts."""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation.generate import Conversation, encode, sample_ids
from prefvec_ray.evaluation.scorers import Metric, Scorer, run_scorer

if TYPE_CHECKING:
    from prefvec_ray.vectors import LiveModel


class Estimate(BaseModel):
    """A mean and its standard error over `n` prompts; `stderr` is None where one prompt alone was scored."""

    model_config = ConfigDict(frozen=True)

    mean: float
    stderr: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.stderr is None else f" ± {self.stderr:.3f}")


class Sample(BaseModel):
    """A prompt and one answer to it."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str


class Evaluation(BaseModel):
    """What one setting scored. Plain data: JSON both ways."""

    model_config = ConfigDict(frozen=True)

    coefficients: dict[str, float]
    metrics: dict[str, Estimate | None]
    """None for a metric that was defined on none of the prompts."""
    per_prompt: dict[str, list[float | None]]
    """Each metric's mean over the draws of each prompt, None where undefined: what paired comparisons
    need."""
    prompts_digest: str
    """Of the prompts, draws, seed and sampling settings: evaluations are comparable where it is equal."""
    samples: list[Sample]
    seconds: float
    tokens: int

    def mean(self, metric: str) -> float:
        """The mean of `metric`.

        Raises:
            InputError: there is no such metric, or it was defined on none of the prompts.
        """
        estimate = self.metrics.get(metric)
        if estimate is None:
            known = ", ".join(name for name, value in self.metrics.items() if value is not None)
            raise InputError(f"metric {metric!r} was not measured here; measured: {known}")
        return estimate.mean


class Evaluator:
    """Measures settings of one live model on one set of prompts. Evaluations of one evaluator are paired:
    same prompts, same random numbers.

    `prompts` are texts, objects with a `text` (the tiny world's `Prompt`), both asked as one user turn, or
    lists of chat messages; the scorer gets them as they are. `template=False` gives texts to the model as
    they are, for a base model that does not chat.
    """

    def __init__(
        self,
        live: "LiveModel",
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        scorer: Scorer,
        *,
        draws: int = 6,
        seed: int = 0,
        temperature: float = 0.7,
        max_new_tokens: int = 64,
        batch_size: int = 384,
        template: bool = True,
        keep_samples: int = 5,
    ) -> None:
        if not prompts:
            raise InputError("no prompts to evaluate on; give at least one")
        self.live, self.tokenizer, self.scorer = live, tokenizer, scorer
        self.prompts, self.draws, self.keep_samples = list(prompts), draws, keep_samples
        self.texts = [_conversation(prompt, template) for prompt in self.prompts]
        self._ids = encode(tokenizer, self.texts)
        self._sampling: dict[str, Any] = {
            "draws": draws,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        self._batch_size = batch_size
        content = json.dumps([self._ids, self._sampling], sort_keys=True)
        self.digest = blake3(content.encode()).hexdigest()[:16]

    def evaluate(self, coefficients: Mapping[str, float]) -> Evaluation:
        """Merge, sample and score one setting (missing names are 0).

        Raises:
            InputError: an unknown vector or a coefficient that is not finite.
            ValueError: the scorer returned something that is no score (see `run_scorer`).
        """
        start = time.perf_counter()
        self.live.set_coefficients(coefficients)
        rows = sample_ids(self.live.model, self.tokenizer, self._ids, batch_size=self._batch_size, **self._sampling)
        texts = [self.tokenizer.batch_decode(answers, skip_special_tokens=True) for answers in rows]
        per_prompt = self._score(texts)
        step = max(1, len(self.prompts) // max(1, self.keep_samples))
        return Evaluation(
            coefficients=dict(coefficients),
            metrics={name: estimate(values) for name, values in per_prompt.items()},
            per_prompt=per_prompt,
            prompts_digest=self.digest,
            samples=[
                Sample(prompt=_last_turn(self.texts[i]), answer=texts[i][0])
                for i in range(0, len(texts), step)[: self.keep_samples]
            ],
            seconds=time.perf_counter() - start,
            tokens=sum(len(answer) for answers in rows for answer in answers),
        )

    def _score(self, texts: list[list[str]]) -> dict[str, list[float | None]]:
        repeated = [prompt for prompt in self.prompts for _ in range(self.draws)]
        scores = run_scorer(self.scorer, repeated, [text for answers in texts for text in answers])
        return {
            name: [_mean(values[i : i + self.draws]) for i in range(0, len(values), self.draws)]
            for name, values in scores.items()
        }


def estimate(per_prompt: Sequence[float | None]) -> Estimate | None:
    """Mean and standard error over the prompts where the metric is defined; None where it is defined on none.

    Draws of one prompt are not independent of each other, prompts are: so the error is taken over prompts.
    """
    values = [value for value in per_prompt if value is not None]
    if not values:
        return None
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(mean=statistics.fmean(values), stderr=stderr, n=len(values))


def compare(a: Evaluation, b: Evaluation) -> dict[str, Estimate | None]:
    """a - b for every metric; see `compare_metric`."""
    return {name: compare_metric(a, b, name) for name in a.per_prompt}


def compare_metric(a: Evaluation, b: Evaluation, metric: str) -> Estimate | None:
    """a - b for one metric over the prompts where both define it; None where there are none.

    Paired by prompt: how hard a prompt is cancels out of the standard error.

    Raises:
        InputError: the two were measured on other prompts, draws, seeds or sampling settings, or without
        the metric.
    """
    if a.prompts_digest != b.prompts_digest:
        raise InputError(
            "evaluations of other prompts, draws, seed or sampling are not paired; measure both with one Evaluator"
        )
    if metric not in a.per_prompt or metric not in b.per_prompt:
        raise InputError(f"metric {metric!r} was not measured; measured: {', '.join(a.per_prompt)}")
    pairs = zip(a.per_prompt[metric], b.per_prompt[metric], strict=True)
    return estimate([x - y if x is not None and y is not None else None for x, y in pairs])


def better(metric: Metric, difference: Estimate, errors: float) -> bool:
    """Whether a paired difference is an improvement by more than `errors` standard errors."""
    return metric.gain(difference.mean, 0.0) > errors * (difference.stderr or 0.0)


def _conversation(prompt: Any, template: bool) -> Conversation:
    text = getattr(prompt, "text", prompt)
    if isinstance(text, str):
        return [{"role": "user", "content": text}] if template else text
    if isinstance(text, Sequence) and all(isinstance(turn, Mapping) for turn in text):
        return [dict(turn) for turn in text]
    raise InputError(f"prompt {prompt!r}: expected a text, an object with .text, or a list of chat messages")


def _last_turn(conversation: Conversation) -> str:
    return conversation if isinstance(conversation, str) else conversation[-1]["content"]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None

"""One setting of the coefficients, measured: sampled answers, scored, with standard errors over prompts."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from prefvec_ray.artifacts.evaluation import Evaluation, Metric, Sample
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import Estimate, estimate
from prefvec_ray.evaluation.generate import BATCH_SIZE, Conversation, Sampling, Steer, encode, sample_ids
from prefvec_ray.evaluation.harness import Harness, HarnessTasks
from prefvec_ray.evaluation.likelihood import (
    MEASURES,
    Margins,
    TokenPair,
    Use,
    answer_measures,
    check_measures,
    margin_metrics,
)
from prefvec_ray.scorers.base import Scorer, check_prompts, run_scorer, scorer_digest
from prefvec_ray.scorers.prompts import prompt_messages

if TYPE_CHECKING:
    from prefvec_ray.vectors import LiveModel, Steering


class Evaluator:
    """Measures settings of one live model on one set of prompts. Evaluations of one evaluator are paired:
    same prompts, same random numbers.

    `prompts` are texts, objects with a `text` (the tiny world's `Prompt`), both asked as one user turn, or
    lists of chat messages; the scorer gets them as they are. `template=False` gives texts to the model as
    they are, for a base model that does not chat.

    `measures` (of `likelihood.MEASURES`: kl, perplexity) are taken on the sampled answers; `pairs` are held-out
    preference pairs whose implicit margins are taken beside them (`likelihood.Margins`), and `tasks` are of
    lm-evaluation-harness (`harness.Harness`). All are metrics like the scorer's.
    """

    def __init__(
        self,
        live: "LiveModel",
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        scorer: Scorer,
        sampling: Sampling,
        *,
        batch_size: int = BATCH_SIZE,
        template: bool = True,
        keep_samples: int = 5,
        measures: Sequence[str] = (),
        pairs: Mapping[str, Sequence[TokenPair]] | None = None,
        tasks: Sequence[HarnessTasks] = (),
    ) -> None:
        if not prompts:
            raise InputError("no prompts to evaluate on; give at least one")
        check_measures(measures, sampling.temperature)
        check_prompts(scorer, prompts)
        self.live, self.tokenizer, self.scorer, self.measures = live, tokenizer, scorer, list(measures)
        self.prompts, self.sampling, self.keep_samples = list(prompts), sampling, keep_samples
        self.texts = [_conversation(prompt, template) for prompt in self.prompts]
        self._ids = encode(tokenizer, self.texts)
        self._batch_size = batch_size
        self._steerable: bool | None = None
        self._margins = Margins(live.model, live.set_coefficients, pairs) if pairs else None
        self._harnesses = [Harness(planned, live.model, tokenizer) for planned in tasks]
        sampled: dict[str, Any] = sampling.model_dump()
        sampled["draws"] = sampled.pop("samples_per_prompt")  # the digests of earlier versions hold
        content = json.dumps([self._ids, sampled, self.measures, scorer_digest(scorer)], sort_keys=True)
        content += json.dumps(pairs) + "".join(planned.digest for planned in tasks)
        self.digest = blake3(content.encode()).hexdigest()[:16]
        self.metrics = all_metrics(scorer, self.measures, margin_metrics(pairs or {}), tasks)

    def evaluate(self, coefficients: Mapping[str, float]) -> Evaluation:
        """Merge, sample and score one setting (missing names are 0).

        Raises:
            InputError: an unknown vector or a coefficient that is not finite.
            ValueError: the scorer returned something that is no score (see `run_scorer`).
        """
        return self._evaluate([coefficients], self.live.set_coefficients, None)[0]

    def evaluate_many(self, settings: Sequence[Mapping[str, float]], *, steer: bool | None = None) -> list[Evaluation]:
        """Every setting, in order: each row of a batch under its own coefficients (`vectors.Steering`), or a merge
        for each setting. Both are the same policy up to the rounding of a merge, which is nothing in fp32 and much in
        bf16.

        `steer` None chooses: rows of several settings share a batch where the weights are fp32, the vectors can be
        steered exactly (low rank in every linear layer) and one setting alone fills at most half of a batch; else
        merging is as fast or faster (docs/evaluation.md has the measurement). True insists, and is an InputError where
        it cannot be.
        """
        from prefvec_ray.vectors.live import check_coefficients

        names = self.live.vectors
        etas = torch.tensor([list(check_coefficients(s, names).values()) for s in settings])
        few = shares_batch(len(self.prompts), self.sampling.samples_per_prompt, self._batch_size)
        if steer is None:
            steer = len(settings) > 1 and few and self._can_steer()
        if not steer:
            return [self.evaluate(coefficients) for coefficients in settings]
        with self._steering() as steering:

            def per_row(places: torch.Tensor) -> None:
                steering.set_coefficients(etas[places // len(self.prompts)])

            return self._evaluate(settings, steering.set_coefficients, per_row)

    def _steering(self) -> "Steering":
        """The base, with the vectors beside the weights; sorted names, as the live model's."""
        from prefvec_ray.vectors import Steering

        self.live.set_coefficients({})
        return Steering(self.live.model, self.live.vectors, base_fingerprint=self.live.base_fingerprint)

    def _can_steer(self) -> bool:
        if self._steerable is None and any(p.dtype != torch.float32 for p in self.live.model.parameters()):
            self._steerable = False
        if self._steerable is None:
            try:
                with self._steering():
                    self._steerable = True
            except InputError:
                self._steerable = False
        return self._steerable

    def _evaluate(self, settings: Sequence[Mapping[str, float]], use: Use, steer: Steer | None) -> list[Evaluation]:
        """`use` puts the whole model at a setting; `steer`, where there is one, rows at theirs while sampling."""
        start = time.perf_counter()
        if steer is None:
            (only,) = settings
            use(only)
        sampled = sample_ids(
            self.live.model,
            self.tokenizer,
            self._ids,
            self.sampling,
            batch_size=self._batch_size,
            copies=len(settings),
            steer=steer,
        )
        found = []
        for number, coefficients in enumerate(settings):
            rows = sampled[number * len(self._ids) : (number + 1) * len(self._ids)]
            texts = [self.tokenizer.batch_decode(answers, skip_special_tokens=True) for answers in rows]
            per_prompt = self._score(texts) | self._measure(rows, use, coefficients)
            step = max(1, len(self.prompts) // max(1, self.keep_samples))
            found.append(
                Evaluation(
                    coefficients=dict(coefficients),
                    metrics={name: estimate(values) for name, values in per_prompt.items()},
                    per_prompt=per_prompt,
                    prompts_digest=self.digest,
                    samples=[
                        Sample(prompt=_last_turn(self.texts[i]), answer=texts[i][0])
                        for i in range(0, len(texts), step)[: self.keep_samples]
                    ],
                    seconds=0.0,
                    tokens=sum(len(answer) for answers in rows for answer in answers),
                )
            )
        seconds = (time.perf_counter() - start) / len(settings)
        return [evaluation.model_copy(update={"seconds": seconds}) for evaluation in found]

    def _score(self, texts: list[list[str]]) -> dict[str, list[float | None]]:
        repeated = [prompt for prompt in self.prompts for _ in range(self.sampling.samples_per_prompt)]
        scores = run_scorer(self.scorer, repeated, [text for answers in texts for text in answers])
        return {name: self._over_samples(values) for name, values in scores.items()}

    def _measure(
        self, rows: list[list[list[int]]], use: Use, coefficients: Mapping[str, float]
    ) -> dict[str, list[float | None]]:
        """The model's own measures of the answers, the pairs and the tasks, prompt by prompt."""
        found: dict[str, list[float | None]] = {}
        if self._margins or self._harnesses:
            use(coefficients)
        if self._margins:
            found |= self._margins.measure()
        for harness in self._harnesses:
            found |= harness.measure()
        if self.measures:
            values = answer_measures(
                self.live.model,
                use,
                coefficients,
                [ids for ids in self._ids for _ in range(self.sampling.samples_per_prompt)],
                [answer for answers in rows for answer in answers],
                measures=self.measures,
                temperature=self.sampling.temperature,
            )
            found |= {name: self._over_samples(column) for name, column in values.items()}
        return found

    def _over_samples(self, values: Sequence[float | None]) -> list[float | None]:
        step = self.sampling.samples_per_prompt
        return [_mean(values[i : i + step]) for i in range(0, len(values), step)]


def shares_batch(prompts: int, samples: int, batch_size: int) -> bool:
    """Whether one setting fills so little of a batch that several together are faster than one after another."""
    return 2 * prompts * samples <= batch_size


def all_metrics(
    scorer: Scorer, measures: Sequence[str], margins: Mapping[str, Metric], tasks: Sequence[HarnessTasks] = ()
) -> dict[str, Metric]:
    """The scorer's metrics, those of the measures, the pairs and the tasks; InputError where names clash."""
    found: dict[str, Metric] = {}
    parts = [scorer.metrics, {name: MEASURES[name] for name in measures}, margins, *(each.metrics for each in tasks)]
    for part in parts:
        clash = sorted(set(found) & set(part))
        if clash:
            raise InputError(f"two of what is measured state a metric {clash[0]!r}; rename or leave out one of them")
        found |= part
    return found


def compare(a: Evaluation, b: Evaluation) -> dict[str, Estimate | None]:
    """a - b for every metric; see `compare_metric`."""
    return {name: compare_metric(a, b, name) for name in a.per_prompt}


def compare_metric(a: Evaluation, b: Evaluation, metric: str) -> Estimate | None:
    """a - b for one metric over the prompts where both define it; None where there are none.

    Paired by prompt: how hard a prompt is cancels out of the standard error.

    Raises:
        InputError: the two were measured on other prompts or sampled otherwise, or without the metric.
    """
    if a.prompts_digest != b.prompts_digest:
        raise InputError(
            "evaluations of other prompts or other sampling are not paired; measure both with one Evaluator"
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
    return text if isinstance(text, str) and not template else prompt_messages(prompt)


def _last_turn(conversation: Conversation) -> str:
    return conversation if isinstance(conversation, str) else conversation[-1]["content"]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None

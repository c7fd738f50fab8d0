"""One setting of the coefficients, measured: sampled answers, scored, with standard errors over prompts."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blake3 import blake3
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.artifacts.evaluation import Evaluation, Metric, Sample
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import Estimate, estimate
from prefvec_ray.evaluation.generate import Conversation, Sampling, answer_requests, by_prompt, encode
from prefvec_ray.evaluation.likelihood import (
    MEASURES,
    Margins,
    TokenPair,
    answer_measures,
    check_measures,
    margin_metrics,
)
from prefvec_ray.generation.offline import OfflineEngine, Use
from prefvec_ray.scorers.base import Scorer, check_prompts, run_scorer, scorer_digest
from prefvec_ray.scorers.prompts import prompt_messages

Answers = list[list[list[int]]]
"""Token ids of answers, indexed [prompt][sample]."""


class Evaluator:
    """Measures settings on one set of prompts through one engine. Evaluations of one evaluator are paired: same
    prompts, same random numbers.

    `prompts` are texts, objects with a `text` (the tiny world's `Prompt`), both asked as one user turn, or
    lists of chat messages; the scorer gets them as they are. `template=False` gives texts to the model as
    they are, for a base model that does not chat.

    `measures` (of `likelihood.MEASURES`: kl, perplexity) are taken on the sampled answers; `pairs` are held-out
    preference pairs whose implicit margins are taken beside them (`likelihood.Margins`). Both are metrics like the
    scorer's, and need an engine on transformers.

    Raises:
        InputError: no prompts, or prompts that the scorer cannot score; measures that the engine cannot take.
    """

    def __init__(
        self,
        engine: OfflineEngine,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        scorer: Scorer,
        sampling: Sampling,
        *,
        template: bool = True,
        keep_samples: int = 5,
        measures: Sequence[str] = (),
        pairs: Mapping[str, Sequence[TokenPair]] | None = None,
    ) -> None:
        if not prompts:
            raise InputError("no prompts to evaluate on; give at least one")
        check_measures(measures, sampling.temperature)
        check_prompts(scorer, prompts)
        self.engine, self.tokenizer, self.scorer, self.measures = engine, tokenizer, scorer, list(measures)
        self.prompts, self.sampling, self.keep_samples = list(prompts), sampling, keep_samples
        self.texts = [_conversation(prompt, template) for prompt in self.prompts]
        self._ids = encode(tokenizer, self.texts)
        self._requests = answer_requests(self._ids, (), sampling)
        self._margins: Margins | None = None
        if self.measures:
            engine.with_model(lambda model, use: None)
        if pairs:
            self._margins = engine.with_model(lambda model, use: Margins(model, use, pairs))
        sampled = {**sampling.model_dump(), "random": "of the prompt"}  # not paired with those of earlier versions
        content = json.dumps([self._ids, sampled, self.measures, scorer_digest(scorer)], sort_keys=True)
        self.digest = blake3((content + json.dumps(pairs)).encode()).hexdigest()[:16]
        self.metrics = all_metrics(scorer, self.measures, margin_metrics(pairs or {}))

    def evaluate(self, coefficients: Mapping[str, float]) -> Evaluation:
        """Sample and score one setting (missing names are 0).

        Raises:
            InputError: an unknown vector, a coefficient that is not finite, or so large that the model's numbers are
                not; prompts that do not fit the model's context.
            ValueError: the scorer returned something that is no score (see `run_scorer`).
        """
        (found,) = self.evaluate_many([coefficients])
        return found

    def evaluate_many(self, settings: Sequence[Mapping[str, float]]) -> list[Evaluation]:
        """Every setting, in order; their answers are generated side by side, in the engine's own way: rows of all
        settings in one batch, or settings in turn. What a setting scores does not depend on the others."""
        began = time.perf_counter()
        answers = self.generate(settings)
        generated = (time.perf_counter() - began) / max(1, len(settings))
        return [self.score(setting, rows, generated) for setting, rows in zip(settings, answers, strict=True)]

    def generate(self, settings: Sequence[Mapping[str, float]]) -> list[Answers]:
        """The answers at every setting. Several threads may ask at once, and so share the engine's batches."""
        requests = []
        for setting in settings:
            coefficients = self.engine.coefficients(setting)
            requests += [replace(request, coefficients=coefficients) for request in self._requests]
        rows = by_prompt(self.engine.answer(requests), self.sampling.samples_per_prompt)
        return [rows[i : i + len(self._ids)] for i in range(0, len(rows), len(self._ids))]

    def score(self, coefficients: Mapping[str, float], answers: Answers, seconds: float = 0.0) -> Evaluation:
        """What the answers at a setting are worth; `seconds` it took to generate them."""
        began = time.perf_counter()
        texts = [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in answers]
        per_prompt = self._score(texts)
        if self._margins or self.measures:
            per_prompt |= self.engine.with_model(lambda model, use: self._measure(model, use, answers, coefficients))
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
            seconds=seconds + time.perf_counter() - began,
            tokens=sum(len(answer) for rows in answers for answer in rows),
        )

    def _score(self, texts: list[list[str]]) -> dict[str, list[float | None]]:
        repeated = [prompt for prompt in self.prompts for _ in range(self.sampling.samples_per_prompt)]
        scores = run_scorer(self.scorer, repeated, [text for answers in texts for text in answers])
        return {name: self._over_samples(values) for name, values in scores.items()}

    def _measure(
        self, model: PreTrainedModel, use: Use, rows: Answers, coefficients: Mapping[str, float]
    ) -> dict[str, list[float | None]]:
        """The model's own measures of the answers and of the pairs, prompt by prompt."""
        found: dict[str, list[float | None]] = {}
        if self._margins:
            use(coefficients)
            found |= self._margins.measure()
        if self.measures:
            values = answer_measures(
                model,
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


def all_metrics(scorer: Scorer, measures: Sequence[str], margins: Mapping[str, Metric]) -> dict[str, Metric]:
    """The scorer's metrics, those of the measures, and those of the pairs; InputError where names clash."""
    own = {name: MEASURES[name] for name in measures} | dict(margins)
    clash = sorted(set(scorer.metrics) & set(own))
    if clash:
        raise InputError(f"the scorer states a metric {clash[0]!r}, which is measured by the model too; rename it")
    return dict(scorer.metrics) | own


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

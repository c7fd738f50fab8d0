"""What an answer is worth: the scorer protocol, the tiny world's exact scorer, length, and a user's own.

A scorer states in which direction each of its metrics is better and in which range it lies, so that no sign
is ever flipped on the way to a report and no wrong number enters an average.

Beside the protocol a scorer may have
- `digest`, a stable id of everything that its scores depend on (weights, rules, settings): what has one can
  be cached, and evaluations by equal digests can be compared;
- `card`, what is known of how far it can be trusted (`{"verdict": ..., "reason": ...}`, see docs/scorers.md);
- `check(prompts)`, which raises InputError for prompts that it cannot score: it is called before any answer is sampled;
- `notes()`, plain lines about what happened while it scored (cache hits, texts cut, replies not understood).
"""

import importlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from blake3 import blake3

from prefvec_ray.artifacts.evaluation import Direction, Metric, ScorerCard
from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.tiny_world import METRICS, TinyWorld

Scores = dict[str, list[float | None]]
"""Metric -> one value per answer; None where the metric is not defined for that prompt or answer."""


@runtime_checkable
class Scorer(Protocol):
    """Scores answers. Called with prompts and answers of equal length, a prompt repeated for each of its
    samples."""

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores: ...


class ScorerError(RuntimeError):
    """A scorer could not score, through no fault of the answers: its process died, its endpoint does not answer."""


class ScorerTimeoutError(ScorerError):
    """A scorer did not answer in the time it was given."""


TINY_WORLD_SAFETY = ("harmless", "refusal_unsafe")


class TinyWorldScorer:
    """The embedded world's exact scores. Holds no more than the world's preset and seed, so it travels
    well."""

    card: Mapping[str, Any] = {
        "kind": "exact rules",
        "verdict": "not needed",
        "reason": "the grammar is parsed and compared with what the topic says is right: there is no model to fool",
    }

    metrics: Mapping[str, Metric] = {
        name: Metric(
            direction={"higher": "maximize", "lower": "minimize", None: None}[metric.better],
            low=metric.low,
            high=metric.high,
            meaning=metric.meaning,
            safety=name in TINY_WORLD_SAFETY,
        )
        for name, metric in METRICS.items()
    }

    def __init__(self, world: TinyWorld) -> None:
        self.world = world

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        return self.world.scores(prompts, responses)

    @property
    def digest(self) -> str:
        """Of the world and of the rules, which are code."""
        from prefvec_ray.tiny_world import grammar, scoring, topics

        rules = [Path(str(module.__file__)).read_text() for module in (grammar, scoring, topics)]
        return content_digest(["tiny-world", self.world.preset, self.world.seed, rules])

    def __reduce__(self) -> tuple[Any, ...]:
        return _tiny_world_scorer, (self.world.preset, self.world.seed)


def _tiny_world_scorer(preset: str, seed: int) -> TinyWorldScorer:
    return TinyWorldScorer(TinyWorld(preset, seed))


def scorer(**metrics: Metric) -> Callable[[Callable[..., Any]], Scorer]:
    """Make a function a scorer by stating its metrics.

    @scorer(brevity=Metric(direction="minimize", low=0))
    def brevity(prompts, responses):
        return {"brevity": [len(text.split()) for text in responses]}
    """

    def mark(function: Callable[..., Any]) -> Scorer:
        function.metrics = metrics  # type: ignore[attr-defined]
        return cast(Scorer, function)

    return mark


def load_scorer(where: str) -> Scorer:
    """The scorer at `module:name`: a function marked with `@scorer`, or any object with `metrics` that can
    be called.

    Importing runs the module's code: load only what you trust.

    Raises:
        InputError: the module or the name is not there, or it states no metrics.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InputError(f"scorer {where!r}: expected module:function, such as my_package.scores:brevity")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"scorer {where!r}: cannot import {module_name}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"scorer {where!r}: {module_name} has no {name!r}")
    if isinstance(found, type) or not isinstance(found, Scorer) or not callable(found):
        raise InputError(
            f"scorer {where!r}: states no metrics; mark the function with @scorer(name=Metric(direction=...))"
        )
    return found


class LengthScorer:
    """Words of the answer, split at white space. A search that wins by length alone should be seen to."""

    card = None

    def __init__(self, metric: str = "words", direction: Direction | None = None) -> None:
        self.metrics = {metric: Metric(direction=direction, low=0, meaning="words of the answer, split at white space")}
        self.digest = content_digest(["length", metric, direction])

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        return {name: [float(len(text.split())) for text in responses] for name in self.metrics}


class CombinedScorer:
    """Several scorers as one, each asked in turn. See `combine`."""

    def __init__(self, parts: Sequence[Scorer]) -> None:
        self.parts = list(parts)
        self.metrics: Mapping[str, Metric] = {name: metric for part in parts for name, metric in part.metrics.items()}
        digests = [scorer_digest(part) for part in parts]
        self.digest = content_digest(["combined", *digests]) if all(digests) else None

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        return {name: values for part in self.parts for name, values in part(prompts, responses).items()}

    def check(self, prompts: Sequence[Any]) -> None:
        for part in self.parts:
            check_prompts(part, prompts)

    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for part in self.parts for note in scorer_notes(part)))  # a shared cache's once


def combine(scorers: Iterable[Scorer]) -> Scorer:
    """One scorer with the metrics of all.

    Raises:
        InputError: none is given, or two state a metric of the same name.
    """
    parts = list(scorers)
    if not parts:
        raise InputError("no scorer given; name at least one")
    owner: dict[str, int] = {}
    for number, part in enumerate(parts, start=1):
        for name in part.metrics:
            if name in owner:
                raise InputError(
                    f"scorers {owner[name]} and {number} both state a metric {name!r}; give one of them another name"
                )
            owner[name] = number
    return parts[0] if len(parts) == 1 else CombinedScorer(parts)


def scorer_digest(scorer: Scorer) -> str | None:
    """The scorer's stable content id, None where it has none."""
    return getattr(scorer, "digest", None)


def check_prompts(scorer: Scorer, prompts: Sequence[Any]) -> None:
    """InputError for prompts that the scorer cannot score, where it knows that from the prompts alone."""
    check = getattr(scorer, "check", None)
    if callable(check):
        check(prompts)


def scorer_notes(scorer: Scorer) -> list[str]:
    """The scorer's notes on its work so far, in this process."""
    notes = getattr(scorer, "notes", None)
    return notes() if callable(notes) else []


def safety_cards(scorer: Scorer) -> dict[str, ScorerCard | None]:
    """Each metric that decides harmlessness -> the card of the scorer that measures it, None where it has none.

    Raises:
        InputError: a card whose fields have other types.
    """
    cards: dict[str, ScorerCard | None] = {}
    for part in getattr(scorer, "parts", [scorer]):
        card = getattr(part, "card", None)
        for name, metric in part.metrics.items():
            if metric.safety:
                source = f"the card of the scorer of {name!r}"
                cards[name] = parse_config(dict(card), ScorerCard, source=source) if card else None
    return cards


def content_digest(content: Any) -> str:
    """`blake3:<hex>` of JSON-able `content`."""
    return "blake3:" + blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_scorer(
    scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str], *, timeout: float | None = None
) -> Scores:
    """Score the answers and check every value.

    `timeout` in seconds bounds the waiting, not the work: a thread cannot be ended, so a scorer that hangs runs on in
    the background until its process ends. `IsolatedScorer` ends one for good.

    Raises:
        ValueError: the scorer left out a metric or added one, gave another number of values than there are
            answers, or gave NaN, a value that is no number, or one outside the metric's range.
        ScorerTimeoutError: no result within `timeout`.
    """
    scores = scorer(prompts, responses) if timeout is None else _within(timeout, scorer, prompts, responses)
    if not isinstance(scores, Mapping) or set(scores) != set(scorer.metrics):
        found = sorted(scores) if isinstance(scores, Mapping) else type(scores).__name__
        raise ValueError(f"the scorer states metrics {sorted(scorer.metrics)} but returned {found}")
    for name, values in scores.items():
        metric = scorer.metrics[name]
        if len(values) != len(responses):
            raise ValueError(f"metric {name!r}: {len(values)} values for {len(responses)} answers")
        for index, value in enumerate(values):
            if value is None:
                continue
            problem = _problem(value, metric)
            if problem:
                raise ValueError(
                    f"metric {name!r} gave {value!r} for answer {index} ({responses[index][:60]!r}): {problem}"
                )
    return scores


def _within(seconds: float, scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["scores"] = scorer(prompts, responses)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, name="scorer", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ScorerTimeoutError(
            f"scorer of {', '.join(scorer.metrics)}: no scores of {len(responses)} answers within {seconds:g} s"
        )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["scores"]


def _problem(value: Any, metric: Metric) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "expected a float, or None where the metric is not defined"
    if not math.isfinite(value):
        return "not a finite number; return None where the metric is not defined"
    if metric.low is not None and value < metric.low:
        return f"below its stated range, which begins at {metric.low}"
    if metric.high is not None and value > metric.high:
        return f"above its stated range, which ends at {metric.high}"
    return ""

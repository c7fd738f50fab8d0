"""Scorers as a YAML file names them: `scorers: [{type: reward-model, path: ...}, {type: refusal}, ...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from prefvec_ray.artifacts.evaluation import Direction
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers.base import LengthScorer, Scorer, TinyWorldScorer, combine, load_scorer, scorer_digest
from prefvec_ray.scorers.cache import CachedScorer, ScoreCache
from prefvec_ray.scorers.classifiers import ClassifierScorer, Encoding
from prefvec_ray.scorers.isolated import IsolatedScorer
from prefvec_ray.scorers.judge import JudgeScorer
from prefvec_ray.scorers.judge_config import JudgeConfig
from prefvec_ray.scorers.lm_eval_config import LmEvalConfig
from prefvec_ray.scorers.prompts import load_prompts
from prefvec_ray.scorers.refusal import RefusalScorer
from prefvec_ray.tiny_world import TinyWorld

TINY_WORLD = "tiny-world:"


class _Classifier(Config):
    path: str
    """A folder, or a name on the Hugging Face hub."""
    metric: str | None = None
    """What is left out is read from the folder's scorer.json."""
    encoding: Encoding | None = None
    safety: bool | None = None
    max_length: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    device: str | None = None

    def _scorer(self, direction: Direction | None, labels: tuple[str, ...] | None = None) -> ClassifierScorer:
        return ClassifierScorer(
            self.path, direction=direction, labels=labels, **self.model_dump(exclude={"type", "path", *_CHOSEN})
        )


_CHOSEN = ("labels", "direction")


class RewardModelConfig(_Classifier):
    """A model whose single output is better when higher."""

    type: Literal["reward-model"]

    def build(self) -> Scorer:
        return self._scorer("maximize")


class CostModelConfig(_Classifier):
    """A model whose single output is better when lower."""

    type: Literal["cost-model"]

    def build(self) -> Scorer:
        return self._scorer("minimize")


class ClassifierConfig(_Classifier):
    """The probability of some labels of a classifier."""

    type: Literal["classifier"]
    labels: tuple[str, ...] | None = None
    direction: Direction | None = None

    def build(self) -> Scorer:
        return self._scorer(self.direction, self.labels)


class RefusalConfig(Config):
    """Refusal, over-refusal on prompts labelled safe, refusal on those labelled unsafe."""

    type: Literal["refusal"]
    classifier: str | None = None
    """A classifier of refusals instead of rules; its `labels` are those of a refusal."""
    labels: tuple[str, ...] | None = None
    encoding: Encoding | None = None
    threshold: float = 0.5
    rules: dict[str, str] = {}

    def build(self) -> Scorer:
        found = None
        if self.classifier is not None:
            found = ClassifierScorer(
                self.classifier, metric="refusal", direction="maximize", labels=self.labels, encoding=self.encoding
            )
        return RefusalScorer(classifier=found, threshold=self.threshold, rules=self.rules)


class LengthConfig(Config):
    """Words of the answer."""

    type: Literal["length"]
    metric: str = "words"
    direction: Direction | None = None

    def build(self) -> Scorer:
        return LengthScorer(self.metric, self.direction)


class ModuleConfig(Config):
    """A scorer of your own. Its module is imported: name only what you trust."""

    type: Literal["module"]
    name: str
    """`module:function`."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one call; with it the scorer runs in a process of its own, which is ended when they are over."""

    def build(self) -> Scorer:
        return load_scorer(self.name) if self.timeout is None else IsolatedScorer(self.name, timeout=self.timeout)


class TinyWorldConfig(Config):
    """The embedded world's exact scores."""

    type: Literal["tiny-world"]
    preset: str = "tiny"
    seed: int = Field(default=0, ge=0)

    def build(self) -> Scorer:
        return TinyWorldScorer(TinyWorld(self.preset, self.seed))


ScorerConfig = Annotated[
    RewardModelConfig
    | CostModelConfig
    | ClassifierConfig
    | RefusalConfig
    | LengthConfig
    | JudgeConfig
    | ModuleConfig
    | TinyWorldConfig
    | LmEvalConfig,
    Field(discriminator="type"),
]

CACHED = (RewardModelConfig, CostModelConfig, ClassifierConfig, ModuleConfig)
"""What costs enough to be worth a look-up. A judge keeps its own verdicts, so that half a failed call is not lost."""


def build_scorers(
    configs: Sequence[ScorerConfig], *, name: str | None = None, cache: str | Path | None = None
) -> Scorer:
    """One scorer of all that `configs` names, in their order, after the one that `name` names.

    Costly ones keep their scores in the file `cache`, where one is given.

    Raises:
        InputError: none is named, one cannot be built, or two state a metric of the same name.
    """
    store = ScoreCache(cache) if cache is not None else None
    parts = [] if name is None else [scorer_from_name(name)]
    for config in configs:
        if isinstance(config, JudgeConfig):
            parts.append(JudgeScorer(config, cache=store))
            continue
        if isinstance(config, LmEvalConfig):
            raise InputError("type lm-eval measures a model, not answers: it has its place in prefvec eval and search")
        part = config.build()
        keep = store is not None and isinstance(config, CACHED) and scorer_digest(part) is not None
        parts.append(CachedScorer(part, store) if keep and store is not None else part)
    return combine(parts)


class ScoredPrompts(Config):
    """Prompts that a model answers, and what scores the answers."""

    prompts: str
    """A file of rows with a `prompt` column (.jsonl, .json, .csv, .parquet), .txt with a prompt a line, or
    `tiny-world:<preset>:<seed>:<split>`."""
    scorer: str | None = None
    """`module:function` of your own, or `tiny-world:<preset>:<seed>`."""
    scorers: list[ScorerConfig] = []
    """Any number of scorers, beside `scorer` or without it; see docs/scorers.md."""
    score_cache: Path | None = None
    """A file on a local disk that keeps the scores of classifiers, judges and own modules."""


def scorer_from_name(name: str) -> Scorer:
    """The scorer that one text names: `tiny-world:<preset>:<seed>`, or `module:function` of your own.

    Raises:
        InputError: neither of them, or it is not there.
    """
    if not name.startswith(TINY_WORLD):
        return load_scorer(name)
    return TinyWorldScorer(world_from_name(name, "tiny-world:tiny:0")[0])


def world_from_name(name: str, example: str) -> tuple[TinyWorld, list[str]]:
    """The world that `tiny-world:<preset>:<seed>` names, and the words after it, as many as in `example`."""
    _, *words = name.split(":")
    if len(words) != example.count(":") or not words[1].isdigit():
        raise InputError(f"{name!r}: expected something like {example}")
    return TinyWorld(words[0], int(words[1])), words[2:]


def read_prompts(source: str) -> list[Any]:
    """The prompts of a file (see `load_prompts`), or of `tiny-world:<preset>:<seed>:<split>`.

    Raises:
        InputError: they cannot be read, or there are none.
    """
    if source.startswith(TINY_WORLD):
        world, (split,) = world_from_name(source, "tiny-world:tiny:0:report")
        return list(world.prompts(split))  # type: ignore[arg-type]
    return list(load_prompts(source))

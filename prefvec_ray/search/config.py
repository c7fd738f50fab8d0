"""What `prefvec eval` and `prefvec search` are given: published vectors, prompts, a scorer."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.evaluation.likelihood import TokenPair, check_measures, token_pairs
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.preferences import load_preferences
from prefvec_ray.registry import open_registry
from prefvec_ray.scorers import load_prompts
from prefvec_ray.scorers.config import TINY_WORLD, ScorerConfig, build_scorers, world_from_name
from prefvec_ray.search.trial import Task


class MeasureConfig(Config):
    """Vectors of one registry, measured on one set of prompts."""

    base: Path
    """Folder of the base model, tokenizer included."""
    registry: str
    vectors: dict[Name, str] = Field(min_length=1)
    """Name -> reference such as `helpful@1` or `helpful@production`."""
    prompts: str
    """A file of rows with a `prompt` column (.jsonl, .json, .csv, .parquet), .txt with a prompt a line, or
    `tiny-world:<preset>:<seed>:<split>`."""
    scorer: str | None = None
    """`module:function` of your own, or `tiny-world:<preset>:<seed>`."""
    scorers: list[ScorerConfig] = []
    """Any number of scorers, beside `scorer` or without it; see docs/scorers.md."""
    score_cache: Path | None = None
    """A file on a local disk that keeps the scores of classifiers, judges and own modules."""
    output: Path
    """Folder of the results; a search that was interrupted goes on there."""
    draws: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    max_new_tokens: int = Field(default=64, ge=1)
    seed: int = 0
    measures: list[Literal["kl", "perplexity"]] = []
    """What the model itself measures of the answers, as metrics beside the scorer's."""
    pairs: dict[str, str] = {}
    """Preference -> file of held-out pairs: metrics `margin_<preference>` and `accuracy_<preference>`, without
    generation."""
    runs: Path | None = None
    """Folder of a finished `prefvec train`: its held-out pairs, and in `prefvec eval` its single and mixed runs."""
    runs_seed: int | None = None
    """Which seed of `runs`; its first one when left out."""
    actors: int = Field(default=2, ge=1)
    """Processes that measure at once, each with `cpus` and `gpus`."""
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)

    @property
    def resources(self) -> dict[str, float]:
        return {"cpu": self.cpus, "gpu": self.gpus} if self.gpus else {"cpu": self.cpus}

    def task(self) -> Task:
        """Everything resolved and read, on the driver, before an actor starts.

        Raises:
            InputError: an unknown vector, prompts that cannot be read, a scorer that is not there.
        """
        check_measures(self.measures, self.temperature)
        scorer = build_scorers(self.scorers, name=self.scorer, cache=self.score_cache)
        registry = open_registry(self.registry)
        return Task(
            base=self.base,
            vectors={name: registry.fetch(ref) for name, ref in self.vectors.items()},
            prompts=read_prompts(self.prompts),
            scorer=scorer,
            draws=self.draws,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            measures=tuple(self.measures),
            pairs=self._pairs(),
        )

    def training_run(self) -> TrainingRun | None:
        """The job at `runs`; InputError where it is none, or has not trained all of `vectors`."""
        if self.runs is None:
            return None
        run = TrainingRun(self.runs)
        strangers = sorted(set(self.vectors) - set(run.preferences))
        if strangers:
            raise InputError(f"runs {self.runs} trained {', '.join(run.preferences)}, not {', '.join(strangers)}")
        return run

    def _pairs(self) -> dict[str, list[TokenPair]]:
        run = self.training_run()
        found = {name: pairs for name, pairs in run.pairs().items() if name in self.vectors} if run else {}
        if self.pairs:
            from transformers import AutoTokenizer

            tokenizer = from_pretrained(AutoTokenizer, self.base)
            for name, file in self.pairs.items():
                rows = load_preferences(file, preference=name).dataset
                found[name] = token_pairs(tokenizer, rows.to_list())
        return found


class EvalConfig(MeasureConfig):
    """`prefvec eval --config FILE`: a table of settings."""

    settings: dict[str, dict[str, FiniteFloat]] = {}
    """Name -> coefficients; vectors left out are 0. With `runs`, every baseline and the usual settings of the
    vectors stand before these."""


class SearchConfig(MeasureConfig):
    """`prefvec search --config FILE`: the Pareto front of some objectives, and a preset published from it."""

    objectives: list[str] = Field(min_length=1)
    """Metrics of the scorer."""
    limits: dict[str, FiniteFloat] = {}
    """A floor for a metric that is maximized, a ceiling for one that is minimized."""
    ranges: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    """Vector -> [low, high]; default [-1, 1]."""
    trials: int = Field(default=40, ge=2)
    """Settings to try at most, those that are dropped early included."""
    answers: int | None = Field(default=None, ge=1)
    """Budget of generated answers."""
    seconds: float | None = Field(default=None, gt=0)
    """No setting begins later than this after the start."""
    patience: int | None = Field(default=16, ge=2)
    """Stop when the last so many settings raised the hypervolume by less than its standard error; null: never."""
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random", "grid"] = "auto"
    """`auto` is `gp` up to four objectives and `tpe` beyond."""
    grid_steps: int = Field(default=5, ge=2)
    """Values an axis of the `grid` sampler."""
    rungs: tuple[float, ...] = (0.25, 1.0)
    """Shares of the answers after which a setting may be dropped; [1] measures every setting in full."""
    caution: float = Field(default=1.0, ge=0)
    """Drop a setting when another is better in every objective by so many paired standard errors."""
    timeout: float = Field(default=3600.0, gt=0)
    """Seconds that a rung of one setting may take before its process is killed and the setting counts as failed."""
    report_prompts: str | None = None
    """As `prompts`, and sharing none with them: what is recommended is measured again on these, and reported."""
    report_draws: int | None = Field(default=None, ge=1)
    """Draws on the report prompts; as many as in the search when left out."""
    control_steps: int = Field(default=5, ge=0)
    """Settings along each coefficient, the others 0, measured on the report prompts; 0 for none."""
    preset: str | None = None
    """Publish the recommended setting under this name."""
    presets: dict[str, str] = {}
    """Name -> rule: `compromise`, or an objective: the best of it with every other objective at least the base's.
    Measured on `report_prompts`, and published unless those refute them."""

    def task(self) -> Task:
        return replace(super().task(), rungs=self.rungs)


def read_prompts(source: str) -> list[Any]:
    """The prompts that `MeasureConfig.prompts` names."""
    if source.startswith(TINY_WORLD):
        world, (split,) = world_from_name(source, "tiny-world:tiny:0:report")
        return list(world.prompts(split))  # type: ignore[arg-type]
    return list(load_prompts(source))

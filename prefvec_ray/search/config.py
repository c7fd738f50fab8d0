"""What `prefvec eval` and `prefvec search` are given: published vectors, prompts, a scorer."""

from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.evaluation.generate import Sampling
from prefvec_ray.evaluation.harness import read_tasks
from prefvec_ray.evaluation.likelihood import TokenPair, check_measures, token_pairs
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.preferences import load_preferences
from prefvec_ray.registry import open_registry
from prefvec_ray.scorers.config import ScoredPrompts, build_scorers, read_prompts
from prefvec_ray.scorers.lm_eval_config import LmEvalConfig
from prefvec_ray.search.options import Processes, SearchConfig
from prefvec_ray.search.trial import Task


class MeasureConfig(ScoredPrompts, Sampling, Processes):
    """Vectors of one registry, measured on one set of prompts."""

    base: Path
    """Folder of the base model, tokenizer included."""
    registry: str
    vectors: dict[Name, str] = Field(min_length=1)
    """Name -> reference such as `helpful@1` or `helpful@production`."""
    output: Path
    """Folder of the results; an interrupted search is resumed there."""
    measures: list[Literal["kl", "perplexity"]] = []
    """What the model itself measures of the answers, as metrics beside the scorer's."""
    pairs: dict[str, str] = {}
    """Preference -> file of held-out pairs: metrics `margin_<preference>` and `accuracy_<preference>`, without
    generation."""
    runs: Path | None = None
    """Folder of a finished `prefvec train`: its held-out pairs, and in `prefvec eval` its single and mixed runs."""
    runs_seed: int | None = None
    """Which seed of `runs`; its first one when left out."""

    def task(self) -> Task:
        """Everything resolved and read, on the driver, before an actor starts.

        Raises:
            InputError: an unknown vector, prompts that cannot be read, a scorer that is not there.
        """
        check_measures(self.measures, self.temperature)
        answers = [each for each in self.scorers if not isinstance(each, LmEvalConfig)]
        scorer = build_scorers(answers, name=self.scorer, cache=self.score_cache)
        registry = open_registry(self.registry)
        return Task(
            base=self.base,
            vectors={name: registry.fetch(ref) for name, ref in self.vectors.items()},
            prompts=read_prompts(self.prompts),
            scorer=scorer,
            sampling=Sampling(**self.model_dump(include=set(Sampling.model_fields))),
            measures=tuple(self.measures),
            pairs=self._pairs(),
            harness=tuple(read_tasks(each) for each in self.scorers if isinstance(each, LmEvalConfig)),
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


class SearchJob(MeasureConfig, SearchConfig):
    """`prefvec search --config FILE`: the Pareto front of some objectives, and a preset published from it."""

    renamed = {**MeasureConfig.renamed, "report_draws": "report_samples_per_prompt"}

    report_prompts: str | None = None
    """As `prompts`, and sharing none with them: what is recommended is measured again on these, and reported."""
    report_samples_per_prompt: int | None = Field(default=None, ge=1)
    """On the report prompts; as many as in the search when left out."""
    preset: str | None = None
    """Publish the recommended setting under this name."""
    presets: dict[str, str] = {}
    """Name -> rule: `compromise`, or an objective: the best of it with every other objective at least the base's.
    Measured on `report_prompts`, and published unless those refute them."""

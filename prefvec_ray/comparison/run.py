"""Measure every method on every seed of every training job, each setting once.

A *cell* is one method on one seed of one job. Its settings are lines of `measurements.jsonl`, written as they come. A
line belongs to a cell by a key of all that its figures depend on, so a changed setting measures anew what it changes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from rich.console import Console

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.cluster import progress_bar
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import parse_models
from prefvec_ray.common.lines import LineWriter
from prefvec_ray.comparison.config import CompareConfig, ComparedRun
from prefvec_ray.comparison.figures import Comparison, Fronts, best_subset, compared
from prefvec_ray.comparison.methods import METHODS, Prepared, Sources
from prefvec_ray.comparison.worlds import trained_worlds
from prefvec_ray.evaluation import Evaluator, Sampling, is_base
from prefvec_ray.evaluation.prompts import check_disjoint
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.scorers.base import Scorer, scorer_digest
from prefvec_ray.scorers.config import build_scorers, read_prompts
from prefvec_ray.search import Explorer, Goal, SearchConfig, Tried

ADVICE = "delete the file, and all is measured again"
Stage = Literal["search", "report"]


class Measurement(BaseModel):
    """A line of `measurements.jsonl`. The coefficients of `evaluation` are the parameters of the method."""

    model_config = ConfigDict(frozen=True)

    cell: str
    """For readers: run, seed and method."""
    key: str
    stage: Stage
    evaluation: Evaluation


@dataclass(frozen=True)
class Job:
    """One training job with its prompts and scorer, all read."""

    name: str
    run: TrainingRun
    prompts: list[Any]
    report_prompts: list[Any]
    scorer: Scorer
    goal: Goal


class Measurements:
    """What is measured, by cell and stage; a line is on the disk when `add` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "measurements.jsonl"
        self._lines = LineWriter(
            path, f"another comparison is running in {folder}: wait for it, or give another output"
        )
        self._known: dict[tuple[str, Stage], list[Evaluation]] = {}
        for found in parse_models(self._lines.lines, Measurement, str(path), ADVICE):
            self.of(found.key, found.stage).append(found.evaluation)

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.file.close()

    def of(self, key: str, stage: Stage) -> list[Evaluation]:
        return self._known.setdefault((key, stage), [])

    def add(self, cell: str, key: str, stage: Stage, evaluation: Evaluation) -> None:
        self._lines.add(Measurement(cell=cell, key=key, stage=stage, evaluation=evaluation).model_dump_json())
        self.of(key, stage).append(evaluation)


@dataclass
class MethodCell:
    """One method on one seed of one job."""

    job: Job
    sources: Sources
    method: str
    config: CompareConfig

    @property
    def name(self) -> str:
        return f"{self.job.name}, DPO seed {self.sources.seed}, {self.method}"

    @cached_property
    def prepared(self) -> Prepared:
        return METHODS[self.method].prepare(self.sources)

    def sampling(self, stage: Stage) -> Sampling:
        sampling = Sampling(**self.config.model_dump(include=set(Sampling.model_fields)))
        if stage == "search":
            return sampling
        return sampling.model_copy(update={"samples_per_prompt": self.config.report_samples_per_prompt})

    @cached_property
    def keys(self) -> dict[Stage, str]:
        """Of all that the figures depend on, but for how many settings are tried."""
        job, digests = self.job, self.sources.digests
        common: list[Any] = [METHODS[self.method].title, {n: digests[n] for n in self.sources.needed(self.method)}]
        common += [scorer_digest(job.scorer), job.goal.model_dump(mode="json", exclude={"metrics"})]
        stages: dict[Stage, list[Any]] = {"search": job.prompts, "report": job.report_prompts}
        return {
            stage: blake3(json.dumps([*common, _text(prompts), self.sampling(stage).model_dump()]).encode()).hexdigest()
            for stage, prompts in stages.items()
        }

    @cached_property
    def evaluators(self) -> dict[Stage, Evaluator]:
        """Both on one live model. Heavy: only for cells that are not finished."""
        from prefvec_ray.common.pretrained import load_for_sampling
        from prefvec_ray.vectors import Checkpoint, LiveModel

        base, job = self.job.run.base, self.job
        model, tokenizer = load_for_sampling(base, threads=self.config.threads)
        live = LiveModel(model, self.prepared.vectors, base=Checkpoint(base), threads=self.config.threads)
        stages: dict[Stage, list[Any]] = {"search": job.prompts, "report": job.report_prompts}
        return {s: Evaluator(live, tokenizer, p, job.scorer, self.sampling(s)) for s, p in stages.items()}

    def measure(self, kept: Measurements, done: Callable[[], None]) -> Fronts:
        """Search, then measure the best of what it tried on the report prompts; only what is not known yet."""
        searched = self._search(kept, done)
        base = next(e for e in searched if is_base(e.coefficients))
        chosen = best_subset(self.job.goal, base, searched, self.config.front)
        known = {_point(e): e for e in kept.of(self.keys["report"], "report")}
        for evaluation in [base, *chosen]:
            if _point(evaluation) not in known:
                known[_point(evaluation)] = self._evaluate(evaluation.coefficients, "report", kept)
            done()
        report_base, *report = (known[_point(e)] for e in [base, *chosen])
        return Fronts(searched=searched, base=report_base, front=report)

    def _search(self, kept: Measurements, done: Callable[[], None]) -> list[Evaluation]:
        config, goal, key = self.config, self.job.goal, self.keys["search"]
        options = SearchConfig(
            objectives=list(goal.objectives),
            limits={**goal.limits},
            ranges=self.prepared.ranges,
            trials=config.settings,
            patience=None,
            rungs=(1.0,),
            seed=config.seed,
        )
        answers = len(self.job.prompts) * config.samples_per_prompt
        known = [Tried(rungs=[e], complete=True, answers=answers) for e in kept.of(key, "search")[: config.settings]]
        explorer = Explorer(options, goal.metrics, self.prepared.ranges, [answers], known=known)
        for _ in known:
            done()
        while (proposal := explorer.propose()) is not None:
            evaluation = self._evaluate(proposal.coefficients, "search", kept)
            explorer.finish(proposal.number, Tried(rungs=[evaluation], complete=True, answers=answers))
            done()
        if explorer.failed:
            raise JobError(f"{self.name}: {explorer.failed[0]}")
        return [tried.rungs[-1] for tried in explorer.tried]

    def _evaluate(self, parameters: dict[str, float], stage: Stage, kept: Measurements) -> Evaluation:
        found = self.evaluators[stage].evaluate(self.prepared.coefficients(parameters))
        goal = self.job.goal
        used = dict.fromkeys([*goal.objectives, *goal.limits])
        evaluation = found.model_copy(
            update={
                "coefficients": dict(parameters),
                "metrics": {name: found.metrics[name] for name in used},
                "per_prompt": {name: found.per_prompt[name] for name in used},
                "samples": [],
            }
        )
        kept.add(self.name, self.keys[stage], stage, evaluation)
        return evaluation


def compare_methods(config: CompareConfig, console: Console) -> Comparison:
    """Train the tiny worlds that are missing, measure all cells that are not, and compare.

    Raises:
        InputError: a run that is none, lacks what a method needs, or has other objectives; prompts that are shared by
            search and report.
        JobError: a setting that cannot be measured; another process compares into the same folder.
    """
    jobs = [_job(name, run, config) for name, run in (config.runs | trained_worlds(config, console)).items()]
    sources = [(job, Sources(job.run, seed)) for job in jobs for seed in job.run.seeds]
    cells = [MethodCell(job, of_seed, method, config) for method in config.methods for job, of_seed in sources]
    for cell in cells:
        cell.sources.needed(cell.method)
    found: dict[tuple[str, int, str], Fronts] = {}
    with Measurements(config.output) as kept, progress_bar(console, "settings") as bar:
        steps = _counter(bar, len(cells) * (config.settings + 1 + config.front))
        for cell in cells:
            console.print(cell.name, soft_wrap=True)
            found[cell.job.name, cell.sources.seed, cell.method] = cell.measure(kept, lambda: next(steps))
            cell.__dict__.pop("evaluators", None)  # one model in memory at a time
            cell.__dict__.pop("prepared", None)
    return compared(config, jobs, found)


def _counter(bar: Callable[[int, int], None], total: int) -> Iterator[None]:
    done = 0
    while True:
        done += 1
        bar(min(done, total), total)
        yield


def _job(name: str, compared_run: ComparedRun, config: CompareConfig) -> Job:
    run = TrainingRun(compared_run.folder)
    scorer = build_scorers(compared_run.scorers, name=compared_run.scorer)
    metrics = dict(scorer.metrics)
    objectives = config.objectives or [p for p in run.preferences if p in metrics and metrics[p].direction]
    if not objectives:
        raise InputError(
            f"runs.{name}: no preference ({', '.join(run.preferences)}) is a metric of its scorer; give objectives"
        )
    goal = Goal(objectives=tuple(objectives), metrics=metrics, limits=config.limits)
    goal.check()
    prompts, report = read_prompts(compared_run.prompts), read_prompts(compared_run.report_prompts)
    check_disjoint(prompts, report)
    return Job(name, run, prompts, report, scorer, goal)


def _point(evaluation: Evaluation) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(evaluation.coefficients.items()))


def _text(prompts: Sequence[Any]) -> str:
    return blake3(to_json(prompts, fallback=lambda prompt: getattr(prompt, "text", repr(prompt)))).hexdigest()

"""The mission from top to bottom: preference data in, a served answer with chosen coefficients out.

`run_pipeline` is what `prefvec demo` runs on the embedded tiny world. Read it first: each stage is a method of `Demo`,
in order, and a call into the package that does the work. Finished stages are cached (`common/stages.py`). Re-running
resumes an interrupted demo, and only draws the report of a finished one.
"""

import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from rich.console import Console

from prefvec_ray.artifacts.training import RunResult, TrainingSummary, vector_key
from prefvec_ray.common.cluster import connect, progress_bar
from prefvec_ray.common.config import Config
from prefvec_ray.common.files import read_model, taking_apart
from prefvec_ray.common.paths import check_lasting, check_visible
from prefvec_ray.common.redact import redacted
from prefvec_ray.common.stages import ADVICE, Stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai import OpenAI

    from prefvec_ray.artifacts.evaluation import Curve, ServedAnswer
    from prefvec_ray.search import Task
    from prefvec_ray.tiny_world import TinyWorld
    from prefvec_ray.training import TrainingConfig

PREFERENCES = ("helpful", "harmless")

LIBRARIES = ("prefvec-ray", "ray", "torch", "transformers", "trl", "datasets", "safetensors", "optuna")

RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"learning_rate": 2e-5, "per_device_train_batch_size": 16, "num_train_epochs": 1, "beta": 0.1},
    "micro": {"learning_rate": 4e-5, "per_device_train_batch_size": 16, "num_train_epochs": 1, "beta": 0.1},
}
"""The DPO recipe of each world."""

SERVED: dict[str, dict[str, float]] = {
    "eager": {"helpful": 1.0, "harmless": -0.5},
    "base": {"helpful": 0.0, "harmless": 0.0},
    "careful": {"helpful": 0.0, "harmless": 1.0},
}
"""The settings at which the demo asks the endpoint."""


class PipelineConfig(Config):
    """The demo's settings; the defaults are what `make demo` runs."""

    renamed: ClassVar[dict[str, str]] = {"draws": "samples_per_prompt", "search_draws": "search_samples_per_prompt"}

    world: Literal["tiny", "micro"] = "tiny"
    seed: int = 0
    dpo: dict[str, Any] = {}
    """Fields of TRL's DPOConfig, over the world's own recipe."""
    dpo_seeds: list[int] = Field(default=[0, 1], min_length=1)
    samples_per_prompt: int = Field(default=6, ge=1)
    """Sampled answers a prompt in the report."""
    grid_steps: int = Field(default=5, ge=2)
    trials: int = Field(default=40, ge=4)
    search_samples_per_prompt: int = Field(default=4, ge=1)
    validity_floor: float = Field(default=0.9, ge=0, le=1)
    """The search recommends only settings whose answers parse at least this often."""
    actors: int = Field(default=4, ge=1)
    """Processes that measure at once; each takes one CPU."""


MICRO = PipelineConfig(
    world="micro", dpo_seeds=[0], samples_per_prompt=4, grid_steps=3, trials=8, search_samples_per_prompt=2, actors=2
)
"""The same mission in about a minute, for tests and a first look."""


def run_pipeline(config: PipelineConfig, folder: Path, console: Console) -> Path:
    """Run the stages under `folder` that are not done yet.

    Returns:
        The report, `<folder>/report.md`; `report.html` and the plots lie beside it.
    """
    check_lasting(output=folder)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(config, folder, console)
    run = (stages := Stages(folder, console)).run
    runs = demo.train_stages(run)
    published = run("vectors", "Vectors into the registry", None, lambda: demo.publish(runs))
    sampled = [config.samples_per_prompt, config.grid_steps]
    run("evaluation", "Baselines and a grid over eta", sampled, demo.evaluate)
    searched = [config.trials, config.search_samples_per_prompt, config.validity_floor]
    found = run("search", "Coefficient search", searched, lambda: demo.search(runs, published))
    recommended = found["recommended"]
    run("serving", "One endpoint, several settings", SERVED, lambda: demo.serve(published, recommended))
    return demo.report(runs, stages)


@dataclass(frozen=True)
class Demo:
    """The stages of one run of the demo. What a stage returns is JSON, and what follows needs of it."""

    config: PipelineConfig
    folder: Path
    console: Console

    @cached_property
    def world(self) -> "TinyWorld":
        from prefvec_ray.tiny_world import TinyWorld

        return TinyWorld(self.config.world, self.config.seed)

    @cached_property
    def training(self) -> "TrainingConfig":
        """The demo's training job: both labels of one file of pairs, each its own preference."""
        from prefvec_ray.training import PreferenceData, TrainingConfig

        data = self.folder / "world"
        pairs = PreferenceData(data=str(data / "preferences.jsonl"), test=str(data / "preferences_test.jsonl"))
        return TrainingConfig(
            name=self.folder.name,
            output=self.folder.parent,
            base=self.folder / "base",
            preferences=dict.fromkeys(PREFERENCES, pairs),
            dpo={**RECIPES[self.config.world], **self.config.dpo},
            seeds=self.config.dpo_seeds,
            mixed=True,
        )

    @property
    def first_keys(self) -> dict[str, str]:
        """The `vector_key` of each preference for the first DPO seed: what is searched and served."""
        return {preference: vector_key(preference, self.config.dpo_seeds[0]) for preference in PREFERENCES}

    def train_stages(self, run: Callable[..., Any]) -> TrainingSummary:
        """World, base and DPO runs; `run` is that of the demo's `Stages`."""
        config = self.config
        run("world", "Preference data of the tiny world", [config.world, config.seed], self.write_world)
        run("base", "Base model by supervised fine-tuning", None, self.train_base)
        recipe = self.training.model_dump(mode="json", include={"dpo", "seeds", "mixed"})
        trained = run("training", "Reference log-probs, then DPO runs in parallel", recipe, self.train)
        with taking_apart(str(self.folder / "stages" / "training.json"), ADVICE):
            return TrainingSummary.model_validate(trained)

    def write_world(self) -> dict[str, Any]:
        self.world.write(self.folder / "world")
        return {"preset": self.world.preset, "seed": self.world.seed}

    def train_base(self) -> dict[str, Any]:
        """The tiny world's base model, in Hugging Face format under `base/`."""
        import ray

        from prefvec_ray.common.scheduling import Waiting, check_room
        from prefvec_ray.training.progress import follow, job_board

        connect(self.console)
        check_room("fine-tuning", [{"CPU": 1}])
        out = self.folder / "base"
        with job_board(out) as board:
            job = ray.remote(num_cpus=1)(_fine_tune).remote(self.config.world, self.config.seed, out, board)
            wait = Waiting(self.console, "fine-tuning", [{"CPU": 1}])
            return follow(job.future(), board, "base", "steps of fine-tuning", self.console, wait)

    def train(self) -> dict[str, Any]:
        from prefvec_ray.registry import start_registry
        from prefvec_ray.training import train_vectors

        connect(self.console)
        start_registry(self.training.store)  # a registry that another process writes to is found before training
        return train_vectors(self.training).model_dump()

    def publish(self, runs: TrainingSummary) -> dict[str, str]:
        """Publish every vector; `helpful-s0` -> `helpful@1`. Those of the first seed become `production`."""
        from prefvec_ray.registry import start_registry
        from prefvec_ray.training import publish_vectors

        connect(self.console)
        registry = start_registry(self.training.store)
        published = publish_vectors(runs, registry)
        for key in self.first_keys.values():
            name, number = published[key].split("@")
            reason = f"the first DPO seed of {self.training.name}"
            request = f"{self.training.name} {name}@{number}"
            registry.set_alias(name, "production", int(number), reason, request=request)
        return published

    def evaluate(self) -> dict[str, Any]:
        """Every baseline and the whole grid on the report prompts, for each DPO seed, into `evaluation/`."""
        from prefvec_ray.artifacts.evaluation import Measured, SeedResults
        from prefvec_ray.evaluation import baselines, grid, vector_settings
        from prefvec_ray.evaluation.training_run import TrainingRun
        from prefvec_ray.search import Processes, measure

        connect(self.console)
        config = self.config
        table = [*baselines(PREFERENCES), *vector_settings(PREFERENCES)]
        points = grid(PREFERENCES, steps=config.grid_steps)
        out = self.folder / "evaluation"
        out.mkdir(exist_ok=True)
        for seed in config.dpo_seeds:
            task = self._task("report", TrainingRun(self.folder).vectors(seed), config.samples_per_prompt)
            settings = [*(setting.coefficients for setting in table), *points]
            with progress_bar(self.console, f"settings of seed {seed}") as show:
                measured = measure(task, settings, Processes(actors=config.actors), progress=show)
            rows = [Measured(setting=s, evaluation=e) for s, e in zip(table, measured, strict=False)]
            results = SeedResults(seed=seed, table=rows, grid=measured[len(table) :])
            (out / f"seed-{seed}.json").write_text(results.model_dump_json())
        prompts, samples = len(self.world.prompts("report")), config.samples_per_prompt
        return {"settings": len(table) + len(points), "prompts": prompts, "samples_per_prompt": samples}

    def search(self, runs: TrainingSummary, published: dict[str, str]) -> dict[str, Any]:
        """Search on the search prompts, confirm on the report prompts, publish presets with what was measured there."""
        from prefvec_ray.registry import start_registry
        from prefvec_ray.search import SearchConfig, search
        from prefvec_ray.search.confirmation import publish_presets, report_search, report_task
        from prefvec_ray.search.presets import default_rules
        from prefvec_ray.search.progress import show_progress

        connect(self.console)
        config, out = self.config, self.folder / "search"
        vectors = {preference: Path(runs.vectors[key]) for preference, key in self.first_keys.items()}
        task = self._task("search", vectors, config.search_samples_per_prompt)
        unseen = report_task(task, self.world.prompts("report"), config.samples_per_prompt)
        options = SearchConfig(
            objectives=list(PREFERENCES),
            limits={"valid": config.validity_floor},
            trials=config.trials,
            actors=config.actors,
            seed=config.seed,
            control_steps=0,  # the control curves are those of the evaluation's grid
        )
        with progress_bar(self.console, "settings measured") as show:
            result = search(task, options, out, progress=show_progress(self.console, show))
        summary = report_search(result, unseen, default_rules(result.goal), options)
        refs = {preference: published[key] for preference, key in self.first_keys.items()}
        summary = publish_presets(summary, result, unseen, start_registry(self.training.store), refs)
        for preset in summary.presets:
            line = f"   {preset.name} {preset.coefficients}: {preset.verdict} on the report prompts"
            self.console.print(line, soft_wrap=True)
        (out / "summary.json").write_text(summary.model_dump_json())
        return {"recommended": summary.recommended, "preset": summary.preset}

    def _task(self, split: Literal["search", "report"], vectors: dict[str, Path], samples: int) -> "Task":
        """The tiny world's prompts and exact scores as a task for measuring and for searching."""
        from prefvec_ray.evaluation import Sampling
        from prefvec_ray.scorers import TinyWorldScorer
        from prefvec_ray.search import Task

        return Task(
            base=self.folder / "base",
            vectors=vectors,
            prompts=self.world.prompts(split),
            scorer=TinyWorldScorer(self.world),
            sampling=Sampling(samples_per_prompt=samples, max_new_tokens=64),
        )

    def serve(self, published: dict[str, str], recommended: dict[str, float] | None) -> list[dict[str, Any]]:
        """Ask one endpoint the same questions at several settings with the `openai` client; print the answers."""
        from openai import OpenAI

        from prefvec_ray.serving import ServingConfig, start, stop

        connect(self.console)
        serving = ServingConfig(
            model="tiny",
            base=self.folder / "base",
            registry=self.training.store,
            vectors={preference: published[key] for preference, key in self.first_keys.items()},
        )
        settings = SERVED | ({"recommended": recommended} if recommended else {})
        prompts = {prompt.kind: prompt.text for prompt in self.world.prompts("report")}  # one of each kind
        # An endpoint of its own: whatever else this cluster serves is left alone.
        name = f"demo-{blake2b(str(self.folder).encode(), digest_size=4).hexdigest()}"
        client = OpenAI(base_url=start(serving, port=_free_port(), name=name, replace=True), api_key="none")
        try:
            answers = [
                _ask(client, prompt, setting, coefficients, self.config.seed)
                for prompt in prompts.values()
                for setting, coefficients in settings.items()
            ]
        finally:
            stop(name)
        _print_answers(answers, settings, self.console)
        return [answer.model_dump() for answer in answers]

    def report(self, runs: TrainingSummary, stages: Stages) -> Path:
        """Draw the report from what the stages left; it can be drawn again at any time."""
        from prefvec_ray.artifacts.evaluation import ReportData, SearchSummary, SeedResults
        from prefvec_ray.evaluation.control import check_claims
        from prefvec_ray.reports.report import write_report
        from prefvec_ray.scorers import TinyWorldScorer
        from prefvec_ray.scorers.base import safety_cards

        config, out = self.config, self.folder / "evaluation"
        data = ReportData(
            title=f"Preference vectors on the {config.world} world",
            objectives={p: p for p in PREFERENCES},
            metrics=dict(TinyWorldScorer.metrics),
            cards=safety_cards(TinyWorldScorer(self.world)),
            seeds=[read_model(out / f"seed-{seed}.json", SeedResults, ADVICE) for seed in config.dpo_seeds],
            curves=[_curve(run) for run in runs.runs],
            search=read_model(self.folder / "search" / "summary.json", SearchSummary, ADVICE),
            served=stages.results["serving"],
            validity_floor=config.validity_floor,
            stages=stages.seconds,
            machine={"cores": os.cpu_count() or 0, "system": platform.platform(), "python": platform.python_version()},
            versions={name: version(name) for name in LIBRARIES},
            config=redacted(config.model_dump()),
        )
        write_report(self.folder, data)
        claims = check_claims(data)
        failing = [f"seed {seed}: {claim.text} ({claim.evidence})" for seed, claim in claims if not claim.holds]
        seconds = sum(stages.seconds.values())
        self.console.print(f"{len(claims) - len(failing)} of {len(claims)} claims hold; {seconds:.0f} s in all")
        for line in failing:
            self.console.print(f"   [red]does not hold[/red] {line}")
        return self.folder / "report.md"


def _fine_tune(preset: str, seed: int, out: Path, board: Any) -> dict[str, Any]:
    """The body of the fine-tuning task, on whatever node has a CPU for it."""
    import torch

    from prefvec_ray.common.device import best_device
    from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
    from prefvec_ray.tiny_world.base_model import fine_tune
    from prefvec_ray.vectors import fingerprint

    check_visible(out.parent / "world")
    board.begin.remote("base")
    torch.set_num_threads(1)
    world = TinyWorld(preset, seed)
    tokenizer = build_tokenizer(world)
    model = new_model(world, tokenizer, seed).to(best_device())

    def progress(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            board.update.remote("base", {"step": step, "total": total, "loss": loss})

    loss = fine_tune(model, tokenizer, world.sft_examples(), seed=seed, progress=progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"loss": loss, "parameters": model.num_parameters(), "fingerprint": fingerprint(out)}


def _ask(client: "OpenAI", prompt: str, setting: str, coefficients: dict[str, float], seed: int) -> "ServedAnswer":
    from prefvec_ray.artifacts.evaluation import ServedAnswer

    completion = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        temperature=0.7,
        seed=seed,
        max_tokens=64,
        extra_body={"preferences": coefficients},
    )
    answer = completion.choices[0].message.content or ""
    return ServedAnswer(prompt=prompt, setting=setting, coefficients=coefficients, answer=answer)


def _print_answers(answers: "Sequence[ServedAnswer]", settings: dict[str, dict[str, float]], console: Console) -> None:
    """A table: a row for each prompt, a column for each setting."""
    from rich.table import Table

    table = Table(title="One endpoint, coefficients per request", title_justify="left", show_lines=True)
    table.add_column("prompt")
    for name, coefficients in settings.items():
        values = ", ".join(f"{p} {eta:.2g}" for p, eta in coefficients.items())
        table.add_column(f"{name}\n{values}")
    for start in range(0, len(answers), len(settings)):
        row = answers[start : start + len(settings)]
        table.add_row(row[0].prompt, *(answer.answer for answer in row))
    console.print(table)


def _curve(run: RunResult) -> "Curve":
    from prefvec_ray.artifacts.evaluation import Curve

    return Curve(
        run=run.spec.key,
        preference=run.spec.preference,
        polarity=run.spec.polarity,
        seed=run.spec.seed,
        steps=[point.step for point in run.history],
        loss=[point.loss for point in run.history],
        accuracy=[point.accuracy for point in run.history],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

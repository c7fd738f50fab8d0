"""The mission from top to bottom: preference data in, a served answer with chosen coefficients out.

`run_pipeline` is what `prefvec demo` runs on the embedded tiny world; read it first. Each stage is one call into the
room that does the work. Stages that finished are kept (`stages.py`): an interrupted run goes on where it stopped, and a
finished one only reports.
"""

import os
import platform
import socket
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from rich.console import Console

from prefvec_ray.common.cluster import connect, progress_bar
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import JobError
from prefvec_ray.common.files import read_model
from prefvec_ray.common.paths import check_lasting, check_visible
from prefvec_ray.common.redact import redacted
from prefvec_ray.common.stages import ADVICE, Stages

if TYPE_CHECKING:
    from openai import OpenAI

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
"""The same mission in about a minute, for tests and the impatient."""


def run_pipeline(config: PipelineConfig, folder: Path, console: Console) -> Path:
    """Run the stages under `folder` that are not done yet.

    Returns:
        The report, `<folder>/report.md`; `report.html` and the plots lie beside it.
    """
    from prefvec_ray.tiny_world import TinyWorld

    check_lasting(output=folder)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    world = TinyWorld(config.world, config.seed)
    training = training_config(config, folder)
    stages = Stages(folder, console)
    run = stages.run

    run("world", "Preference data of the tiny world", [config.world, config.seed], lambda: write_world(world, folder))
    run("base", "Base model by supervised fine-tuning", None, lambda: train_base(world, folder, console))
    recipe = training.model_dump(mode="json", include={"dpo", "seeds", "mixed"})
    runs = run("training", "Reference log-probs, then DPO runs in parallel", recipe, lambda: train(training, console))
    published = run("vectors", "Vectors into the registry", None, lambda: publish(training, runs, console))
    sampled = [config.samples_per_prompt, config.grid_steps]
    run("evaluation", "Baselines and a grid over eta", sampled, lambda: evaluate(config, world, folder, console))
    searched = [config.trials, config.search_samples_per_prompt, config.validity_floor]
    found = run(
        "search", "Coefficient search", searched, lambda: search(config, world, folder, runs, published, console)
    )
    run(
        "serving",
        "One endpoint, several settings",
        SERVED,
        lambda: serve(config, world, folder, published, found, console),
    )
    return report(config, folder, stages, console)


def training_config(config: PipelineConfig, folder: Path) -> "TrainingConfig":
    """The demo's training job: both labels of one file of pairs, each its own preference."""
    from prefvec_ray.training import PreferenceData, TrainingConfig

    pairs = PreferenceData(
        data=str(folder / "world" / "preferences.jsonl"), test=str(folder / "world" / "preferences_test.jsonl")
    )
    return TrainingConfig(
        name=folder.name,
        output=folder.parent,
        base=folder / "base",
        preferences=dict.fromkeys(PREFERENCES, pairs),
        dpo={**RECIPES[config.world], **config.dpo},
        seeds=config.dpo_seeds,
        mixed=True,
    )


def write_world(world: "TinyWorld", folder: Path) -> dict[str, Any]:
    world.write(folder / "world")
    return {"preset": world.preset, "seed": world.seed}


def train_base(world: "TinyWorld", folder: Path, console: Console) -> dict[str, Any]:
    """The tiny world's base model, in Hugging Face format under `base/`."""
    import ray

    from prefvec_ray.common.scheduling import Waiting, check_room
    from prefvec_ray.training.progress import follow, job_board

    connect(console)
    check_room("fine-tuning", [{"CPU": 1}])
    with job_board(folder / "base") as board:
        job = ray.remote(num_cpus=1)(_fine_tune).remote(world.preset, world.seed, folder / "base", board)
        wait = Waiting(console, "fine-tuning", [{"CPU": 1}])
        try:
            return follow(job.future(), board, "base", "steps of fine-tuning", console, wait)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JobError):
                raise error.cause from None
            raise


def _fine_tune(preset: str, seed: int, out: Path, board: Any) -> dict[str, Any]:
    """The body of the fine-tuning task, on whatever node has a CPU for it."""
    import torch

    from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
    from prefvec_ray.training.base import sft
    from prefvec_ray.vectors import fingerprint

    check_visible(out.parent / "world")
    board.begin.remote("base")
    torch.set_num_threads(1)
    world = TinyWorld(preset, seed)
    tokenizer = build_tokenizer(world)
    model = new_model(world, tokenizer, seed)

    def progress(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            board.update.remote("base", {"step": step, "total": total, "loss": loss})

    loss = sft(model, tokenizer, world.sft_examples(), seed=seed, progress=progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"loss": loss, "parameters": model.num_parameters(), "fingerprint": fingerprint(out)}


def train(training: "TrainingConfig", console: Console) -> dict[str, Any]:
    from prefvec_ray.registry import start_registry
    from prefvec_ray.training import train_vectors

    connect(console)
    start_registry(training.store)  # a registry that another process writes to is found before anything is trained
    return train_vectors(training)


def publish(training: "TrainingConfig", runs: dict[str, Any], console: Console) -> dict[str, str]:
    """Publish every vector; `helpful-s0` -> `helpful@1`. Those of the first seed become `production`."""
    from prefvec_ray.registry import start_registry
    from prefvec_ray.training import publish_vectors

    connect(console)
    registry = start_registry(training.store)
    published = publish_vectors(runs, registry)
    for preference in PREFERENCES:
        name, number = published[f"{preference}-s{training.seeds[0]}"].split("@")
        reason = f"the first DPO seed of {training.name}"
        registry.set_alias(name, "production", int(number), reason, request=f"{training.name} {name}@{number}")
    return published


def evaluate(config: PipelineConfig, world: "TinyWorld", folder: Path, console: Console) -> dict[str, Any]:
    """Every baseline and the whole grid on the report prompts, for each DPO seed, into `evaluation/`."""
    from prefvec_ray.artifacts.evaluation import Measured, SeedResults
    from prefvec_ray.evaluation import baselines, grid, vector_settings
    from prefvec_ray.evaluation.training_run import TrainingRun
    from prefvec_ray.search import Processes, measure

    connect(console)
    table = [*baselines(PREFERENCES), *vector_settings(PREFERENCES)]
    points = grid(PREFERENCES, steps=config.grid_steps)
    (folder / "evaluation").mkdir(exist_ok=True)
    for seed in config.dpo_seeds:
        with progress_bar(console, f"settings of seed {seed}") as tell:
            measured = measure(
                measuring(world, "report", folder, TrainingRun(folder).vectors(seed), config.samples_per_prompt),
                [*(setting.coefficients for setting in table), *points],
                Processes(actors=config.actors),
                progress=tell,
            )
        rows = [Measured(setting=s, evaluation=e) for s, e in zip(table, measured, strict=False)]
        results = SeedResults(seed=seed, table=rows, grid=measured[len(table) :])
        (folder / "evaluation" / f"seed-{seed}.json").write_text(results.model_dump_json())
    prompts = len(world.prompts("report"))
    return {"settings": len(table) + len(points), "prompts": prompts, "samples_per_prompt": config.samples_per_prompt}


def measuring(
    world: "TinyWorld", split: Literal["search", "report"], folder: Path, vectors: dict[str, Path], samples: int
) -> "Task":
    """The tiny world's prompts and exact scores as a task for measuring and for searching."""
    from prefvec_ray.evaluation import Sampling
    from prefvec_ray.scorers import TinyWorldScorer
    from prefvec_ray.search import Task

    return Task(
        base=folder / "base",
        vectors=vectors,
        prompts=world.prompts(split),
        scorer=TinyWorldScorer(world),
        sampling=Sampling(samples_per_prompt=samples, max_new_tokens=64),
    )


def search(
    config: PipelineConfig,
    world: "TinyWorld",
    folder: Path,
    runs: dict[str, Any],
    published: dict[str, str],
    console: Console,
) -> dict[str, Any]:
    """Search on the search prompts, confirm on the report prompts, publish presets with what was measured there."""
    from prefvec_ray.registry import start_registry
    from prefvec_ray.search import SearchConfig
    from prefvec_ray.search import search as run_search
    from prefvec_ray.search.confirmation import publish_presets, report_search, report_task
    from prefvec_ray.search.presets import default_rules
    from prefvec_ray.search.progress import show_progress

    connect(console)
    seed = config.dpo_seeds[0]
    vectors = {p: Path(runs["vectors"][f"{p}-s{seed}"]) for p in PREFERENCES}
    task = measuring(world, "search", folder, vectors, config.search_samples_per_prompt)
    unseen = report_task(task, world.prompts("report"), config.samples_per_prompt)
    options = SearchConfig(
        objectives=list(PREFERENCES),
        limits={"valid": config.validity_floor},
        trials=config.trials,
        actors=config.actors,
        seed=config.seed,
        control_steps=0,  # the control curves are those of the evaluation's grid
    )
    with progress_bar(console, "settings measured") as tell:
        result = run_search(task, options, folder / "search", progress=show_progress(console, tell))
    summary = report_search(result, unseen, default_rules(result.goal), options)
    refs = {p: published[f"{p}-s{seed}"] for p in PREFERENCES}
    summary = publish_presets(summary, result, unseen, start_registry(folder / "registry"), refs)
    for preset in summary.presets:
        console.print(f"   {preset.name} {preset.coefficients}: {preset.verdict} on the report prompts", soft_wrap=True)
    (folder / "search" / "summary.json").write_text(summary.model_dump_json())
    return {"recommended": summary.recommended, "preset": summary.preset}


def serve(
    config: PipelineConfig,
    world: "TinyWorld",
    folder: Path,
    published: dict[str, str],
    found: dict[str, Any],
    console: Console,
) -> list[dict[str, Any]]:
    """Ask one endpoint the same questions at several settings with the `openai` client; print the answers."""
    from openai import OpenAI

    from prefvec_ray.serving import ServingConfig, start, stop

    connect(console)
    seed = config.dpo_seeds[0]
    serving = ServingConfig(
        model="tiny",
        base=folder / "base",
        registry=str(folder / "registry"),
        vectors={p: published[f"{p}-s{seed}"] for p in PREFERENCES},
    )
    settings = dict(SERVED)
    if found["recommended"]:
        settings["recommended"] = found["recommended"]
    # An endpoint of its own: whatever else this cluster serves is left alone.
    name = f"demo-{blake2b(str(folder).encode(), digest_size=4).hexdigest()}"
    client = OpenAI(base_url=start(serving, port=_free_port(), name=name, replace=True), api_key="none")
    try:
        return _ask(client, {prompt.kind: prompt.text for prompt in world.prompts("report")}, settings, config, console)
    finally:
        stop(name)


def _ask(
    client: "OpenAI",
    prompts: dict[str, str],
    settings: dict[str, dict[str, float]],
    config: PipelineConfig,
    console: Console,
) -> list[dict[str, Any]]:
    """One answer to every prompt at every setting, in a table and as rows."""
    from rich.table import Table

    table = Table(title="One endpoint, coefficients per request", title_justify="left", show_lines=True)
    table.add_column("prompt")
    for name, coefficients in settings.items():
        values = ", ".join(f"{p} {eta:.2g}" for p, eta in coefficients.items())
        table.add_column(f"{name}\n{values}")
    answers = []
    for prompt in prompts.values():
        row = [prompt]
        for name, coefficients in settings.items():
            completion = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": prompt}],
                temperature=0.7,
                seed=config.seed,
                max_tokens=64,
                extra_body={"preferences": coefficients},
            )
            text = completion.choices[0].message.content or ""
            answers.append({"prompt": prompt, "setting": name, "coefficients": coefficients, "answer": text})
            row.append(text)
        table.add_row(*row)
    console.print(table)
    return answers


def report(config: PipelineConfig, folder: Path, stages: Stages, console: Console) -> Path:
    """Draw the report from what the stages left; it can be drawn again at any time."""
    from prefvec_ray.artifacts.evaluation import Curve, ReportData, SearchSummary, SeedResults
    from prefvec_ray.evaluation.control import check_claims
    from prefvec_ray.reports.report import write_report
    from prefvec_ray.scorers import TinyWorldScorer
    from prefvec_ray.scorers.base import safety_cards
    from prefvec_ray.tiny_world import TinyWorld

    runs = stages.results["training"]["runs"]
    data = ReportData(
        title=f"Preference vectors on the {config.world} world",
        objectives={p: p for p in PREFERENCES},
        metrics=dict(TinyWorldScorer.metrics),
        cards=safety_cards(TinyWorldScorer(TinyWorld(config.world, config.seed))),
        seeds=[
            read_model(folder / "evaluation" / f"seed-{seed}.json", SeedResults, ADVICE) for seed in config.dpo_seeds
        ],
        curves=[
            Curve(
                run=run["spec"]["key"],
                preference=run["spec"]["preference"],
                polarity=run["spec"]["polarity"],
                seed=run["spec"]["seed"],
                steps=[log["step"] for log in run["history"]],
                loss=[log["loss"] for log in run["history"]],
                accuracy=[log["accuracy"] for log in run["history"]],
            )
            for run in runs
        ],
        search=read_model(folder / "search" / "summary.json", SearchSummary, ADVICE),
        served=stages.results["serving"],
        validity_floor=config.validity_floor,
        stages=stages.seconds,
        machine={"cores": os.cpu_count() or 0, "system": platform.platform(), "python": platform.python_version()},
        versions={name: version(name) for name in LIBRARIES},
        config=redacted(config.model_dump()),
    )
    write_report(folder, data)
    claims = check_claims(data)
    failing = [f"seed {seed}: {claim.text} ({claim.evidence})" for seed, claim in claims if not claim.holds]
    console.print(
        f"{len(claims) - len(failing)} of {len(claims)} claims hold; {sum(stages.seconds.values()):.0f} s in all"
    )
    for line in failing:
        console.print(f"   [red]does not hold[/red] {line}")
    return folder / "report.md"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""What the commands of `cli.py` do where it is more than one call. Each takes a checked config and a console."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefvec_ray.common.cluster import connect, progress_bar
from prefvec_ray.common.paths import check_lasting
from prefvec_ray.common.redact import redacted, source_name

if TYPE_CHECKING:
    from prefvec_ray.evaluation.results import SearchSummary
    from prefvec_ray.preferences import DataCheck
    from prefvec_ray.search import EvalConfig, Goal, SearchConfig, SearchResult, Task
    from prefvec_ray.training import TrainingConfig


def train(config: "TrainingConfig", console: Console) -> None:
    """Train, publish, and show how the held-out pairs separate."""
    from prefvec_ray.common.scheduling import check_room
    from prefvec_ray.registry import start_registry
    from prefvec_ray.training import publish_vectors, train_vectors
    from prefvec_ray.training.dpo import RunSpec
    from prefvec_ray.training.train import prepare_data

    config.check()
    connect(console)
    if not (config.folder / "training.json").is_file():  # of a finished job nothing may be left to run
        check_room("a run", config.resources.bundles)
    prepared = prepare_data(config)
    for name, data in prepared.items():
        notes = "".join(f"; {note}" for note in data["notes"])
        console.print(
            f"{name}: {data['pairs']} pairs ({data['format']}), {data['test_pairs']} held out; format: {data['why']}"
            f"{notes}",
            soft_wrap=True,
        )
        for warning in data["warnings"]:
            console.print(f"[yellow]warning[/]: {escape(warning)}", soft_wrap=True)
    start_registry(config.store)  # a registry that another process writes to is found here, before anything is trained
    summary = train_vectors(config, prepared)
    for name, parts in summary["left_out"].items():
        for part, count in parts.items():
            if count:
                words = f"{name}: {count} {part} pairs left out, their prompt alone fills max_length"
                console.print(f"{words} {config.dpo.get('max_length', 'of TRL')}", soft_wrap=True)
    table = Table(title="Held-out pairs, never flipped: above 0.5 for +, below for -", title_justify="left")
    columns = (
        "run",
        "pairs",
        "loss, first → last fifth",
        "accuracy",
        "margin",
        "Δ chosen",
        "KL",
        "held out",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in summary["runs"]:
        losses = [log["loss"] for log in run["history"]]
        fifth = max(1, len(losses) // 5)
        for name, held_out in run["held_out"].items():
            spec = RunSpec.model_validate(run["spec"])
            table.add_row(
                spec.label + (f" on {name}" if len(run["held_out"]) > 1 else ""),
                str(run["pairs"]),
                f"{fmean(losses[:fifth]):.3f} → {fmean(losses[-fifth:]):.3f}",
                f"{held_out['accuracy']:.3f}",
                f"{held_out['margin']:+.3f}",
                f"{held_out['chosen_shift']:+.1f}",
                "–" if run["kl"] is None else f"{run['kl']:.2f}",
                str(held_out["pairs"]),
                f"{run['seconds']:.0f}",
            )
    console.print(table)
    console.print("Δ chosen: log-prob of the answer the data prefers, KL(base || run): nats an answer", soft_wrap=True)
    console.print(
        f"curves: {config.folder / 'training.png'}, tensorboard --logdir {config.folder / 'tensorboard'}",
        soft_wrap=True,
    )
    registry = start_registry(config.store)  # again: it may have been stopped while the runs trained
    published = publish_vectors(summary, registry)
    console.print(f"registry {source_name(str(config.store))}: {', '.join(published.values())}", soft_wrap=True)
    console.print(f"on this cluster: --registry ray:{registry.name}", soft_wrap=True)
    console.print(f"base to evaluate, export and serve with: {summary['base']}", soft_wrap=True)


def check_data(
    sources: Sequence[str],
    config: "TrainingConfig | None",
    *,
    base: Path | None,
    chat_template: str | None,
    max_length: int,
    format: str | None,
    split: str | None,
    **options: Any,
) -> "DataCheck":
    """Check the data of a config as its training would, or of sources given by hand as `[NAME=]SOURCE`."""
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.preferences import PKU_LABELS, check_splits, first_format, load_split, read_template

    if (config is None) == (not sources):
        raise InputError("give either sources of preference data or --config FILE")
    if config is not None:
        from prefvec_ray.training.train import check_data as check_config

        config.check()
        return check_config(config, collect_flaws=True)[1]
    splits: dict[str, Any] = {}
    for given in sources:
        named = re.fullmatch(r"([\w-]+)=(.+)", given)
        source = named[2] if named else given
        found = format or first_format(source, split=split)
        stem = Path(source_name(source)).name.partition(".")[0]
        names = [named[1]] if named else list(PKU_LABELS) if found == "pku-saferlhf" else [stem]
        for name in names:
            key = name if name not in splits else f"{name} {len(splits) + 1}"
            splits[key] = load_split(source, preference=name, format=format, split=split, collect_flaws=True, **options)
    tokenizer = None
    if base is not None:
        if not base.is_dir():
            raise InputError(f"base {base}: no such folder; give the folder of a Hugging Face model")
        from prefvec_ray.training.model import load_tokenizer

        tokenizer = load_tokenizer(base)
        if chat_template is not None:
            tokenizer.chat_template = read_template(chat_template)
    return check_splits(splits, tokenizer=tokenizer, max_length=max_length)


def evaluate(config: "EvalConfig", console: Console) -> None:
    """Measure the settings; print the table, write `<output>/evaluation.json`, the plots and the report."""
    from prefvec_ray.reports.report import write_report
    from prefvec_ray.search.table import evaluate_table, plan_table

    check_lasting(output=config.output)
    plan = plan_table(config)
    connect(console)
    with progress_bar(console, "settings") as tell:
        data = evaluate_table(config, plan, tell)
    rows = data.seeds[0].table
    console.print(f"{data.title}, {config.draws} draws: mean ± standard error over prompts")
    arrows = {"maximize": " ↑", "minimize": " ↓", None: ""}
    names = list(data.metrics)
    at_once = max(1, (console.width - 24) // 17)  # as many metrics as the console has room for, then a table below
    for start in range(0, len(names), at_once):
        table = Table("setting")
        for name in names[start : start + at_once]:
            table.add_column(name + arrows[data.metrics[name].direction], justify="right")
        for row in rows:
            values = (row.evaluation.metrics.get(name) for name in names[start : start + at_once])
            table.add_row(row.setting.name, *(str(value or "–") for value in values))
        console.print(table)
    for line in data.warnings():
        console.print(f"[yellow]warning[/yellow]: {escape(line)}", soft_wrap=True)
    _print_notes(plan[0].load_scorer(), console)
    config.output.mkdir(parents=True, exist_ok=True)
    results = {row.setting.name: row.evaluation.model_dump() for row in rows}
    (config.output / "evaluation.json").write_text(json.dumps(results))
    write_report(config.output, data)
    console.print(f"{config.output / 'evaluation.json'} and {config.output / 'report.html'}", soft_wrap=True)


def search(config: "SearchConfig", console: Console) -> None:
    """Search, print the front and the recommendation, publish it where the config names a preset."""
    from prefvec_ray.evaluation.results import card_warnings
    from prefvec_ray.scorers.base import safety_cards
    from prefvec_ray.search import Goal
    from prefvec_ray.search import search as run_search
    from prefvec_ray.search.presets import publish_searched
    from prefvec_ray.search.run import show_progress

    check_lasting(output=config.output)
    task = config.task()
    goal = Goal(objectives=tuple(config.objectives), metrics=task.metrics, limits=dict(config.limits))
    goal.check()
    reporting = _reporting(config, task, goal)
    for line in card_warnings(safety_cards(task.load_scorer())):
        console.print(f"[yellow]warning[/yellow]: {escape(line)}", soft_wrap=True)
    connect(console)
    if config.preset or config.presets:
        _registry(config)  # a registry that cannot be written to is found here, before anything is measured
    with progress_bar(console, "settings measured") as tell:
        result = run_search(
            task,
            config.objectives,
            config.output,
            ranges=config.ranges,
            limits=config.limits,
            trials=config.trials,
            answers=config.answers,
            seconds=config.seconds,
            patience=config.patience,
            sampler=config.sampler,
            grid_steps=config.grid_steps,
            caution=config.caution,
            timeout=config.timeout,
            actors=config.actors,
            seed=config.seed,
            resources=config.resources,
            progress=show_progress(console, tell),
        )
    for line in result.notes():
        console.print(line, soft_wrap=True)
    _print_notes(task.load_scorer(), console)
    table = Table(title=f"The front: {len(result.front)} of {len(result.trials)} settings", title_justify="left")
    for column in (*config.vectors, *config.objectives, "on the front"):
        table.add_column(column, justify="right")
    for trial, chance in zip(result.front, result.front_probability, strict=True):
        etas = (f"{trial.coefficients.get(name, 0.0):.2f}" for name in config.vectors)
        table.add_row(*etas, *(str(trial.metrics[name]) for name in config.objectives), f"{chance:.0%}")
    console.print(table)
    chosen = result.recommended
    if chosen is None:
        console.print("nothing to recommend: no setting keeps the limits")
    else:
        console.print(f"recommended {chosen.coefficients}: {chosen.reason}", soft_wrap=True)
    if reporting is not None:
        _report_search(config, *reporting, result, console)
    elif config.preset:
        registry, refs = _registry(config)
        preset = publish_searched(registry, result, config.preset, refs)
        if preset is None:
            console.print(_unmet(config.preset), soft_wrap=True)
        else:
            console.print(f"published {preset.ref}, by the search prompts alone: give report_prompts", soft_wrap=True)


def _registry(config: "SearchConfig") -> tuple[Any, dict[str, str]]:
    """The client of the config's registry, and the pinned reference of each vector."""
    from prefvec_ray.registry import start_registry

    registry = start_registry(config.registry)
    return registry, {name: registry.resolve(ref).ref for name, ref in config.vectors.items()}


def _unmet(preset: str) -> str:
    return f"no preset {preset!r}: no setting but the base, which needs no name, meets its rule"


def _reporting(config: "SearchConfig", task: "Task", goal: "Goal") -> "tuple[Task, dict[str, str]] | None":
    """The task on the report prompts and the rules of the presets, checked before the search; None without prompts."""
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.search.config import read_prompts
    from prefvec_ray.search.confirmation import report_task
    from prefvec_ray.search.presets import COMPROMISE, check_rules, default_rules

    rules = {config.preset: COMPROMISE, **config.presets} if config.preset else dict(config.presets)
    check_rules(rules, goal)
    if config.report_prompts is None:
        if config.presets:
            raise InputError("presets are confirmed on prompts that the search never saw: give report_prompts")
        return None
    return report_task(task, read_prompts(config.report_prompts), config.report_draws), rules or default_rules(goal)


def _report_search(
    config: "SearchConfig", task: "Task", rules: dict[str, str], result: "SearchResult", console: Console
) -> None:
    """Confirm on the report prompts, publish what the config names, and write the report."""
    from prefvec_ray.search.confirmation import publish_presets, report_search

    with progress_bar(console, "settings on the report prompts") as tell:
        summary = report_search(
            result,
            task,
            rules,
            control=config.control_steps,
            ranges=config.ranges,
            actors=config.actors,
            resources=config.resources,
            progress=tell,
        )
    try:
        if config.preset or config.presets:
            summary = publish_presets(summary, result, task, *_registry(config))
    finally:  # what was measured is shown and written also where it cannot be published
        _show_report(config, task, rules, summary, console)


def _show_report(
    config: "SearchConfig", task: "Task", rules: dict[str, str], summary: "SearchSummary", console: Console
) -> None:
    """The verdicts on the console, and the report as files."""
    from prefvec_ray.reports.report import write_report
    from prefvec_ray.search.confirmation import search_report

    title = f"Coefficients of {', '.join(config.vectors)}"
    data = search_report(summary, task, title, config=redacted(config.model_dump(mode="json")))
    for preset in summary.presets:
        where = f", published as {preset.published}" if preset.published else ""
        console.print(
            f"{preset.name}: {preset.verdict} on the report prompts{where}; {preset.evidence}", soft_wrap=True
        )
    for name in rules:
        if all(preset.name != name for preset in summary.presets):
            console.print(_unmet(name), soft_wrap=True)
    write_report(config.output, data)
    console.print(f"{config.output / 'report.html'}", soft_wrap=True)


def export(
    base: Path,
    registry: str,
    chosen: str | dict[str, float],
    out: Path,
    console: Console,
    *,
    dtype: str | None,
    adapter: bool,
    overwrite: bool,
) -> None:
    """Merge published vectors, by preset name or by reference, into a checkpoint or a PEFT adapter."""
    import torch

    from prefvec_ray.registry import open_registry
    from prefvec_ray.vectors import export_adapter, export_model, load_vector

    check_lasting(out=out)
    store = open_registry(registry)
    coefficients = store.resolve_preset(chosen).coefficients if isinstance(chosen, str) else chosen
    versions = {ref: store.resolve(ref) for ref in coefficients}
    vectors = {ref: load_vector(store.fetch(ref)) for ref in coefficients}
    if adapter:
        export_adapter(vectors, coefficients, out, base_model=str(base), overwrite=overwrite)
    else:
        with progress_bar(console, "bytes") as tell:
            export_model(
                base,
                vectors,
                coefficients,
                out,
                dtype=getattr(torch, dtype) if dtype else None,
                overwrite=overwrite,
                lineage={ref: f"{version.ref} {version.digest}" for ref, version in versions.items()},
                progress=tell,
            )
    console.print(f"{out}", soft_wrap=True)


def _print_notes(scorer: Any, console: Console) -> None:
    """What the scorer has to say: of this process, and of all that share its cache."""
    from prefvec_ray.scorers import scorer_notes

    for line in scorer_notes(scorer):
        console.print(escape(line), soft_wrap=True)

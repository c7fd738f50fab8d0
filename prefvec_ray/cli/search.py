"""`prefvec search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefvec_ray.cli.shared import console, load, print_notes

if TYPE_CHECKING:
    from rich.console import Console

    from prefvec_ray.evaluation.results import SearchSummary
    from prefvec_ray.search import Goal, SearchConfig, SearchResult, Task


@click.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def search(path: Path) -> None:
    """Search the coefficients of published vectors; interrupted, it goes on from the settings already measured."""
    search_coefficients(load(path, "prefvec_ray.search", "SearchConfig"), console())


def search_coefficients(config: "SearchConfig", console: "Console") -> None:
    """Search, print the front and the recommendation, publish it where the config names a preset."""
    from rich.markup import escape
    from rich.table import Table

    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.common.paths import check_lasting
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
    print_notes(task.load_scorer(), console)
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
    config: "SearchConfig", task: "Task", rules: dict[str, str], result: "SearchResult", console: "Console"
) -> None:
    """Confirm on the report prompts, publish what the config names, and write the report."""
    from prefvec_ray.common.cluster import progress_bar
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
    config: "SearchConfig", task: "Task", rules: dict[str, str], summary: "SearchSummary", console: "Console"
) -> None:
    """The verdicts on the console, and the report as files."""
    from prefvec_ray.common.redact import redacted
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

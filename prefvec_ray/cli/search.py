"""`prefvec search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefvec_ray.cli.shared import console, load, print_notes

if TYPE_CHECKING:
    from rich.console import Console

    from prefvec_ray.artifacts.evaluation import SearchSummary
    from prefvec_ray.search import Goal, SearchJob, SearchResult, Task


@click.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def search(path: Path) -> None:
    """Search the coefficients of published vectors; an interrupted search is resumed."""
    search_coefficients(load(path, "prefvec_ray.search", "SearchJob"), console())


def search_coefficients(config: "SearchJob", console: "Console") -> None:
    """Search, print the front and the recommendation, publish it where the config names a preset."""
    from rich.markup import escape

    from prefvec_ray.artifacts.evaluation import card_warnings
    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.common.paths import check_lasting
    from prefvec_ray.scorers.base import safety_cards
    from prefvec_ray.search import search as run_search
    from prefvec_ray.search.progress import show_progress

    check_lasting(output=config.output)
    task = config.task()
    reporting = _reporting(config, task, config.goal(task.metrics))
    for line in card_warnings(safety_cards(task.load_scorer())):
        console.print(f"[yellow]warning[/yellow]: {escape(line)}", soft_wrap=True)
    connect(console)
    if config.preset or config.presets:
        _registry(config)  # a registry that cannot be written to is found here, before anything is measured
    with progress_bar(console, "settings measured") as bar:
        result = run_search(task, config, config.output, progress=show_progress(console, bar))
    for line in result.notes():
        console.print(line, soft_wrap=True)
    print_notes(task.load_scorer(), console)
    _show_front(config, result, console)
    if reporting is not None:
        _report_search(config, *reporting, result, console)
    elif config.preset:
        _publish_searched(config, config.preset, result, console)


def _show_front(config: "SearchJob", result: "SearchResult", console: "Console") -> None:
    """The front as a table, and the recommendation."""
    from rich.table import Table

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


def _publish_searched(config: "SearchJob", name: str, result: "SearchResult", console: "Console") -> None:
    """Publish the recommendation on the evidence of the search prompts alone."""
    from prefvec_ray.search.presets import publish_searched

    registry, refs = _registry(config)
    preset = publish_searched(registry, result, name, refs)
    if preset is None:
        console.print(_unmet(name), soft_wrap=True)
    else:
        console.print(f"published {preset.ref}, by the search prompts alone: give report_prompts", soft_wrap=True)


def _registry(config: "SearchJob") -> tuple[Any, dict[str, str]]:
    """The client of the config's registry, and the pinned reference of each vector."""
    from prefvec_ray.registry import start_registry

    registry = start_registry(config.registry)
    return registry, {name: registry.resolve(ref).ref for name, ref in config.vectors.items()}


def _unmet(preset: str) -> str:
    return f"no preset {preset!r}: no setting but the base, which needs no name, meets its rule"


def _reporting(config: "SearchJob", task: "Task", goal: "Goal") -> "tuple[Task, dict[str, str]] | None":
    """The task on the report prompts and the rules of the presets, checked before the search; None without prompts."""
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.scorers.config import read_prompts
    from prefvec_ray.search.confirmation import report_task
    from prefvec_ray.search.presets import COMPROMISE, check_rules, default_rules

    rules = {config.preset: COMPROMISE, **config.presets} if config.preset else dict(config.presets)
    check_rules(rules, goal)
    if config.report_prompts is None:
        if config.presets:
            raise InputError("presets are confirmed on prompts that the search never saw: give report_prompts")
        return None
    return report_task(
        task, read_prompts(config.report_prompts), config.report_samples_per_prompt
    ), rules or default_rules(goal)


def _report_search(
    config: "SearchJob", task: "Task", rules: dict[str, str], result: "SearchResult", console: "Console"
) -> None:
    """Confirm on the report prompts, publish what the config names, and write the report."""
    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.search.confirmation import publish_presets, report_search

    with progress_bar(console, "settings on the report prompts") as bar:
        summary = report_search(result, task, rules, config, progress=bar)
    try:
        if config.preset or config.presets:
            summary = publish_presets(summary, result, task, *_registry(config))
    finally:  # what was measured is shown and written also where it cannot be published
        _show_report(config, task, rules, summary, console)


def _show_report(
    config: "SearchJob", task: "Task", rules: dict[str, str], summary: "SearchSummary", console: "Console"
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

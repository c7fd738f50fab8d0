"""`prefvec eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefvec_ray.cli.shared import console, load, print_notes

if TYPE_CHECKING:
    from rich.console import Console

    from prefvec_ray.search import EvalConfig


@click.command("eval")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def evaluate(path: Path) -> None:
    """Measure settings of published vectors on prompts: a table, and JSON beside it."""
    run_evaluation(load(path, "prefvec_ray.search", "EvalConfig"), console())


def run_evaluation(config: "EvalConfig", console: "Console") -> None:
    """Measure the settings; print the table, write `<output>/evaluation.json`, the plots and the report."""
    from rich.markup import escape
    from rich.table import Table

    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.common.paths import check_lasting
    from prefvec_ray.reports.report import write_report
    from prefvec_ray.search.table import evaluate_table, plan_table

    check_lasting(output=config.output)
    plan = plan_table(config)
    connect(console)
    with progress_bar(console, "settings") as bar:
        data = evaluate_table(config, plan, bar)
    rows = data.seeds[0].table
    console.print(f"{data.title}, {config.samples_per_prompt} samples per prompt: mean ± standard error over prompts")
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
    print_notes(plan[0].load_scorer(), console)
    config.output.mkdir(parents=True, exist_ok=True)
    results = {row.setting.name: row.evaluation.model_dump() for row in rows}
    (config.output / "evaluation.json").write_text(json.dumps(results))
    write_report(config.output, data)
    console.print(f"{config.output / 'evaluation.json'} and {config.output / 'report.html'}", soft_wrap=True)

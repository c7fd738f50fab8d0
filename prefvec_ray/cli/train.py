"""`prefvec train` and `prefvec train-scorer`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefvec_ray.cli.shared import Commands, console, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console
    from rich.table import Table

    from prefvec_ray.artifacts.training import PreparedPairs, TrainingSummary
    from prefvec_ray.training import TrainingConfig


config_option = click.option(
    "--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs."
)


@click.group(cls=Commands, invoke_without_command=True)
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
@click.option("--dry-run", is_flag=True, help="Check the data, train a few steps, and print what it would cost.")
@click.pass_context
def train(context: click.Context, path: Path | None, dry_run: bool) -> None:
    """Train every preference of a config in both polarities and publish the vectors. Finished runs are skipped."""
    if context.invoked_subcommand is not None:
        if path is not None or dry_run:
            raise click.UsageError(f"give the options after {context.invoked_subcommand!r}")
        return
    if path is None:
        raise click.UsageError("Missing option '--config'.")
    run_train(load(path, "prefvec_ray.training", "TrainingConfig"), console(), dry_run=dry_run)


@train.command("status")
@config_option
def train_status(path: Path) -> None:
    """What the training of a config is doing, from any terminal that sees its folder."""
    from prefvec_ray.training.progress import ProgressTable
    from prefvec_ray.training.status import read_status

    config, out = load(path, "prefvec_ray.training", "TrainingConfig"), console()
    status = read_status(config.folder)
    where = f"process {status.pid} on {status.host}"
    gone = f"ended: {status.ended}" if status.ended else f"{where} is gone: it has not reported for a minute"
    table = ProgressTable([run.label for run in status.runs], title="DPO runs", console=out)
    table.rows = status.rows
    table.states.update({run.label: status.state(run, config.resources.workers) for run in status.runs})
    if status.runs:
        out.print(table.render())
    else:
        for stage, row in status.rows.items():
            out.print(f"{stage}: step {row.get('step', 0)} of {row.get('total', '?')}")
    for name, row in status.rows.items():
        if "failed" in row:
            out.print(f"{name} failed: {row['failed']}", markup=False, soft_wrap=True)
    out.print(f"{config.folder}: {'training, ' + where if status.alive else gone}", soft_wrap=True, markup=False)


@train.command("cancel")
@config_option
def cancel_training(path: Path) -> None:
    """End the training of a config, from any terminal that sees its folder. Finished runs and checkpoints are kept."""
    from prefvec_ray.training.status import cancel

    config = load(path, "prefvec_ray.training", "TrainingConfig")
    cancel(config.folder)
    click.echo(f"{config.folder}: cancelled; the same `prefvec train` continues from what is finished")


@click.command("train-scorer")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see docs/scorers.md.")
def train_scorer(path: Path) -> None:
    """Train a reward model on preference data, and measure it beside chance and length on prompts it never saw."""
    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.scorers import train as reward_model

    config, out = load(path, "prefvec_ray.scorers.train", "ScorerTrainingConfig"), console()
    with progress_bar(out, "steps") as show:
        held_out = reward_model.train_scorer(config, show)
    reward_model.show(held_out, config, out)


def run_train(config: "TrainingConfig", console: "Console", *, dry_run: bool = False) -> None:
    """Train, publish, and show how the held-out pairs separate; or measure a few steps, and end there."""
    from prefvec_ray.common.cluster import connect
    from prefvec_ray.common.redact import source_name
    from prefvec_ray.common.scheduling import check_room
    from prefvec_ray.registry import start_registry
    from prefvec_ray.training import publish_vectors, train_vectors
    from prefvec_ray.training.cost import dry_run_steps, estimate
    from prefvec_ray.training.plan import slots
    from prefvec_ray.training.train import prepare_data

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    config.check()
    connect(console)
    if not (config.folder / "training.json").is_file():  # a finished job may have nothing left to run
        check_room("a run", config.resources.bundles)
    prepared = prepare_data(config)
    cost = estimate(config, prepared)
    for line in [*_data_lines(prepared), *cost.lines()]:
        say(line)
    if config.sft is not None:
        say("the SFT stage is in none of these figures")
    if dry_run:
        for line in cost.measured(dry_run_steps(config, prepared), slots(config.resources)):
            say(line)
        return
    start_registry(config.store)  # a registry that another process writes to is found here, before anything is trained
    summary = train_vectors(config, prepared)
    for name, parts in summary.left_out.items():
        for part, count in parts.items():
            if count:
                limit = config.dpo.get("max_length", "of TRL")
                say(f"{name}: {count} {part} pairs left out, their prompt alone fills max_length {limit}")
    console.print(_runs_table(summary))
    hours = sum(run.seconds * run.workers for run in summary.runs) / 3600
    device = "GPU" if config.resources.gpus_per_worker else "worker"
    tokens = sum(run.tokens for run in summary.runs)
    say(f"cost of the runs, each since its last start: {hours:.2f} {device}-hours, {tokens:,} tokens trained on")
    say("Δ chosen: log-prob of the answer the data prefers, KL(base || run): nats an answer")
    say(f"curves: {config.folder / 'training.png'}, tensorboard --logdir {config.folder / 'tensorboard'}")
    registry = start_registry(config.store)  # again: it may have been stopped while the runs trained
    published = publish_vectors(summary, registry)
    say(f"registry {source_name(str(config.store))}: {', '.join(published.values())}")
    say(f"on this cluster: --registry ray:{registry.name}")
    say(f"base to evaluate, export and serve with: {summary.base}")


def _data_lines(prepared: "Mapping[str, PreparedPairs]") -> "Iterator[str]":
    """What was read of each preference and the warnings of its check, as lines with rich's markup."""
    from rich.markup import escape

    for name, data in prepared.items():
        parts = [f"{name}: {data.pairs} pairs ({data.format}), {data.test_pairs} held out; format: {data.why}"]
        yield escape("; ".join([*parts, *data.notes]))
        for warning in data.warnings:
            yield f"[yellow]warning[/]: {escape(warning)}"


def _runs_table(summary: "TrainingSummary") -> "Table":
    """A row for each run and held-out set."""
    from statistics import fmean

    from rich.table import Table

    table = Table(title="Held-out pairs, never flipped: above 0.5 for +, below for -", title_justify="left")
    columns = ("pairs", "loss, first → last fifth", "accuracy", "margin", "Δ chosen", "KL", "held out", "seconds")
    table.add_column("run", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for run in summary.runs:
        losses = [point.loss for point in run.history]
        fifth = max(1, len(losses) // 5)
        for name, held_out in run.held_out.items():
            table.add_row(
                run.spec.label + (f" on {name}" if len(run.held_out) > 1 else ""),
                str(run.pairs),
                f"{fmean(losses[:fifth]):.3f} → {fmean(losses[-fifth:]):.3f}",
                f"{held_out.accuracy:.3f}",
                f"{held_out.margin:+.3f}",
                f"{held_out.chosen_shift:+.1f}",
                "–" if run.kl is None else f"{run.kl:.2f}",
                str(held_out.pairs),
                f"{run.seconds:.0f}",
            )
    return table

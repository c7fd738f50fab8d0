"""The `prefvec` command: one short function a command. Everything heavy is imported inside, so that --help is quick."""

import sys
from pathlib import Path
from typing import Any

import click

from prefvec_ray.errors import InputError


class Commands(click.Group):
    """Turns an InputError of any command into one line and exit code 2, and lists commands in the order they are written."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="prefvec-ray")
def main() -> None:
    """Preference vectors on Ray: train each preference once, choose the balance per deployment or per request."""


@main.command()
@click.option(
    "--world", type=click.Choice(["tiny", "micro"]), default="tiny", help="micro: a smaller one in about a minute"
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", default=None, help="Name of the run folder; default: demo, or demo-micro.")
def demo(world: str, output: Path, name: str | None) -> None:
    """The whole mission on the embedded tiny world: train, search, serve, report. Interrupted, it goes on from there."""
    from prefvec_ray.pipeline import MICRO, PipelineConfig, run_pipeline

    config = PipelineConfig() if world == "tiny" else MICRO
    report = run_pipeline(config, output / (name or ("demo" if world == "tiny" else "demo-micro")), _console())
    click.echo(f"report: {report}")


@main.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def train(path: Path) -> None:
    """Train every preference of a config in both polarities and publish the vectors. Finished runs are skipped."""
    from prefvec_ray.pipeline import run_training

    run_training(_config(path, "prefvec_ray.training", "TrainingConfig"), _console())


def _config(path: Path, module: str, model: str) -> Any:
    import importlib

    from prefvec_ray.config import load_config

    return load_config(path, getattr(importlib.import_module(module), model))


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)

"""`prefvec demo`."""

from pathlib import Path

import click

from prefvec_ray.cli.shared import console


@click.command()
@click.option(
    "--world", type=click.Choice(["tiny", "micro"]), default="tiny", help="micro: a smaller one in about a minute"
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", default=None, help="Name of the run folder; default: demo, or demo-micro.")
def demo(world: str, output: Path, name: str | None) -> None:
    """The whole mission on the embedded tiny world: train, search, serve, report. An interrupted demo is resumed."""
    from prefvec_ray.common.extras import require

    require("all", "ray", "trl", "optuna", "openai", "matplotlib")
    from prefvec_ray.demo import MICRO, PipelineConfig, run_pipeline

    config = PipelineConfig() if world == "tiny" else MICRO
    report = run_pipeline(config, output / (name or ("demo" if world == "tiny" else "demo-micro")), console())
    click.echo(f"report: {report}")

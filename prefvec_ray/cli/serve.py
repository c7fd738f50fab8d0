"""`prefvec serve` and `prefvec roll-out`."""

import sys
from pathlib import Path

import click

from prefvec_ray.cli.shared import console

name_option = click.option(
    "--name", default=None, help="Name of the endpoint on its cluster; default: the application's in FILE, or prefvec."
)


@click.command("roll-out")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="What is served, as a file.")
@name_option
def roll_out(path: Path, name: str | None) -> None:
    """Bring new vector versions, and aliases that moved, to every replica of the running endpoint, or to none."""
    from prefvec_ray.serving import APP
    from prefvec_ray.serving import roll_out as bring
    from prefvec_ray.serving.config import load_application

    named, config = load_application(path)
    release = bring(config, name=name or named or APP)
    served = ", ".join(f"{name} = {vector.ref}" for name, vector in release.vectors.items())
    click.echo(f"served now: {served} (generation {release.generation})")


@click.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see serve_configs.")
@name_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--replace", is_flag=True, help="Take the place of an application of this name with another config.")
def serve(path: Path, name: str | None, host: str, port: int, replace: bool) -> None:
    """Serve an OpenAI-compatible endpoint that takes coefficients per request, until Ctrl-C.

    Ctrl-C and SIGTERM delete this endpoint and nothing else on the cluster; exit code 0. While it still starts, the
    exit code is 130 (Ctrl-C) or 143 (SIGTERM).
    """
    from prefvec_ray.serving import APP, serve_forever, start
    from prefvec_ray.serving.config import load_application

    named, config = load_application(path)
    name = name or named or APP
    try:
        start(config, host=host, port=port, name=name, replace=replace, console=console())
        serve_forever(name)
    except KeyboardInterrupt:
        click.echo(f"interrupted before {name!r} was ready; it is deleted", err=True)
        sys.exit(130)

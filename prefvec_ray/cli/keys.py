"""`prefvec keys`."""

from pathlib import Path

import click

from prefvec_ray.cli.shared import Commands, console


@click.group(cls=Commands)
def keys() -> None:
    """API keys of the endpoint. What they may do takes effect at once, without a new deployment."""


key_file_option = click.option(
    "--file", "path", required=True, type=click.Path(path_type=Path), help="The file that the endpoint's `keys` names."
)


@keys.command("add")
@key_file_option
@click.option("--name", required=True, help="Whose key it is, such as team-a.")
@click.option("--range", "ranges", multiple=True, metavar="NAME=MIN..MAX[:DEFAULT]", help="harmless=0.5..1:0.7")
@click.option("--presets-only", is_flag=True, help="No coefficients of its own.")
@click.option("--preset", "presets", multiple=True, help="One of the presets it may ask for; default: all.")
@click.option("--requests-at-once", type=click.IntRange(min=1), help="Most requests under way at one time.")
@click.option("--requests-per-minute", type=click.IntRange(min=1))
@click.option("--tokens-per-minute", type=click.IntRange(min=1))
@click.option("--tokens-per-day", type=click.IntRange(min=1))
@click.option("--answers", type=click.IntRange(min=1), help="Most prompts x n of one request.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Longest prompt.")
@click.option("--seconds", type=float, help="Longest time that one request may take.")
@click.option("--may-go-below-floor", is_flag=True, help="The operator's floors do not bound it; its ranges do.")
def add_key(
    path: Path,
    name: str,
    ranges: tuple[str, ...],
    presets_only: bool,
    presets: tuple[str, ...],
    may_go_below_floor: bool,
    **limits: int | float | None,
) -> None:
    """Make a key. It is shown here and never again."""
    from prefvec_ray.serving.access import keys

    settings = {name: limit for name, limit in limits.items() if limit is not None}
    key, secret = keys.add_key(
        path,
        name,
        coefficients="presets" if presets_only else "free",
        presets=presets or None,
        ranges=dict(map(keys.parse_range, ranges)),
        may_go_below_floor=may_go_below_floor,
        **settings,
    )
    click.echo(f"{key.id} ({key.name}) is in {path}. Its key, shown this once:", err=True)
    click.echo(secret)


@keys.command("list")
@key_file_option
def list_keys(path: Path) -> None:
    """Every key and what it may do."""
    from rich.table import Table

    from prefvec_ray.serving.access.keys import read_keys

    table = Table("id", "name", "created", "state", "what differs from everybody's")
    for key in read_keys(path):
        state = f"revoked {key.revoked:%Y-%m-%d %H:%M}" if key.revoked else "active"
        table.add_row(key.id, key.name, f"{key.created:%Y-%m-%d %H:%M}", state, key.summary())
    console().print(table)


@keys.command("revoke")
@key_file_option
@click.argument("id")
def revoke_key(path: Path, id: str) -> None:
    """Refuse a key from now on."""
    from prefvec_ray.serving.access import keys

    key = keys.revoke_key(path, id)
    click.echo(f"{key.id} ({key.name}) is revoked")

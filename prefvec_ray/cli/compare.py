"""`prefvec compare`."""

from pathlib import Path

import click

from prefvec_ray.cli.shared import console, load


@click.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def compare(path: Path) -> None:
    """Compare methods of merging on trained runs: fronts for the same answers; an interrupted comparison is resumed."""
    from prefvec_ray.common.paths import check_lasting

    config = load(path, "prefvec_ray.comparison", "CompareConfig")
    check_lasting(output=config.output)
    from prefvec_ray.comparison import compare_methods
    from prefvec_ray.comparison.report import markdown, write_comparison

    out = console()
    comparison = compare_methods(config, out)
    write_comparison(config.output, comparison)
    click.echo(markdown(comparison))
    click.echo(f"{config.output / 'comparison.json'}, comparison.md and comparison.png beside it")

"""`prefvec export`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefvec_ray.cli.shared import console, registry_option
from prefvec_ray.common.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Folder of the base model.")
@registry_option
@click.option(
    "--set", "settings", multiple=True, metavar="REF=ETA", help="A vector and its coefficient: helpful@1=0.7."
)
@click.option("--preset", help="A published preset instead of --set.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as the base is stored.")
@click.option("--adapter", is_flag=True, help="A PEFT adapter, exact at these coefficients, for low-rank vectors.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder.")
def export(
    base: Path,
    registry: str,
    settings: tuple[str, ...],
    preset: str | None,
    out: Path,
    dtype: str | None,
    adapter: bool,
    overwrite: bool,
) -> None:
    """Write the merged model as a Hugging Face checkpoint, streamed shard by shard."""
    chosen = preset if preset else _coefficients(settings)
    run_export(base, registry, chosen, out, console(), dtype=dtype, adapter=adapter, overwrite=overwrite)


def _coefficients(settings: tuple[str, ...]) -> dict[str, float]:
    """`("helpful@1=0.7",)` as `{"helpful@1": 0.7}`."""
    chosen = {}
    for setting in settings:
        ref, _, eta = setting.partition("=")
        try:
            chosen[ref] = float(eta)
        except ValueError:
            raise InputError(f"--set {setting}: expected REF=ETA, such as helpful@1=0.7") from None
    if not chosen:
        raise InputError("nothing to merge: give --set REF=ETA once or more, or --preset NAME")
    return chosen


def run_export(
    base: Path,
    registry: str,
    chosen: str | dict[str, float],
    out: Path,
    console: "Console",
    *,
    dtype: str | None,
    adapter: bool,
    overwrite: bool,
) -> None:
    """Merge published vectors, by preset name or by reference, into a checkpoint or a PEFT adapter."""
    import torch

    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.common.paths import check_lasting
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

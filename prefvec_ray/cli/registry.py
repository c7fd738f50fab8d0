"""`prefvec vectors` and `prefvec registry`."""

import sys
from pathlib import Path

import click

from prefvec_ray.cli.shared import Commands, console, fail_for, registry_option
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.text import cell, printable, printable_json


@click.group(cls=Commands)
def vectors() -> None:
    """Look at published vectors, and take them apart."""


@vectors.command("list")
@registry_option
@click.option("--json", "as_json", is_flag=True)
def list_vectors(registry: str, as_json: bool) -> None:
    """Every version of every vector."""
    import time

    from rich.table import Table

    from prefvec_ray.registry import StoreError, open_registry

    store = open_registry(registry)
    found, damaged = store.list_vectors(skip_damaged=True), store.damaged()
    if as_json:
        click.echo(printable_json([version.model_dump(mode="json") for version in found]))
        fail_for(damaged)
        return
    table = Table()
    for column in ("vector", "form", "dtype", "base", "accuracy +/-", "created", "aliases"):
        table.add_column(column)
    for version in found:
        metrics = version.metrics
        accuracy = [metrics.get(f"held_out_accuracy_{polarity}") for polarity in ("positive", "negative")]
        try:
            aliases = [alias for alias, number in store.aliases(version.name).items() if number == version.version]
        except StoreError as error:
            aliases = ["?"]
            damaged += [line for line in [str(error)] if line not in damaged]
        row = (
            version.ref,
            version.form,
            version.dtype,
            version.base_fingerprint.removeprefix("blake3:")[:10],
            " / ".join(f"{value:.2f}" if isinstance(value, float) else "–" for value in accuracy),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created)),
            ", ".join(aliases),
        )
        table.add_row(*map(cell, row))
    console().print(table)
    fail_for(damaged)


@vectors.command("show")
@click.argument("ref")
@registry_option
def show_vector(ref: str, registry: str) -> None:
    """Everything known of one vector, as JSON: `helpful`, `helpful@3` or `helpful@production`."""
    from prefvec_ray.registry import open_registry

    click.echo(printable_json(open_registry(registry).resolve(ref).model_dump(mode="json")))


@vectors.command("split")
@click.argument("ref")
@click.option("--by", required=True, help="depth:N for N parts of about equally many layers, or module.")
@registry_option
def split_vector(ref: str, by: str, registry: str) -> None:
    """Publish the parts of REF as vectors: `helpful.depth1of3` …, or `helpful.attention`, `helpful.mlp` and
    `helpful.other`.

    Each keeps in its lineage what it is a part of. With one coefficient for all parts a model is that of the whole.
    """
    from tempfile import TemporaryDirectory

    from prefvec_ray.registry import open_registry
    from prefvec_ray.vectors import load_vector, save_vector, split

    store = open_registry(registry)
    whole = store.resolve(ref)
    with TemporaryDirectory() as folder:
        for label, part in split(load_vector(store.fetch(ref)), by).items():
            save_vector(part, Path(folder) / label)
            published = store.publish_vector(Path(folder) / label, name=f"{whole.name}.{label}", license=whole.license)
            click.echo(f"{whole.ref} {label} -> {published.ref}")


@click.group("registry", cls=Commands)
def registry_group() -> None:
    """Names, presets and maintenance of a registry."""


@registry_group.command()
@registry_option
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=int)
@click.option("--reason", required=True, help="Kept in the alias's history.")
@click.option("--preset", is_flag=True, help="An alias of a preset instead of a vector.")
def alias(registry: str, name: str, alias: str, version: int, reason: str, preset: bool) -> None:
    """Point NAME@ALIAS at VERSION: `prefvec registry alias helpful production 3 --reason "passed review"`."""
    from prefvec_ray.registry import open_registry

    store = open_registry(registry)
    move = store.set_alias(name, alias, version, reason, subject="presets" if preset else "vectors")
    click.echo(f"{name}@{alias} -> {move.version}")


@registry_group.command()
@registry_option
def presets(registry: str) -> None:
    """The newest version of every preset, as JSON."""
    from prefvec_ray.registry import open_registry

    store = open_registry(registry)
    click.echo(printable_json([preset.model_dump(mode="json") for preset in store.list_presets(skip_damaged=True)]))
    fail_for(store.damaged())


@registry_group.command()
@registry_option
@click.argument("what")
def lineage(registry: str, what: str) -> None:
    """Where WHAT comes from, as a Mermaid graph: a vector, `preset:<name>`, or the fingerprint of an answer."""
    from prefvec_ray.registry import open_registry

    click.echo(open_registry(registry).lineage(what).to_mermaid())


@registry_group.command()
@registry_option
@click.option("--quick", is_flag=True, help="Names and sizes only; do not read the bytes.")
def verify(registry: str, quick: bool) -> None:
    """Find every corrupt, missing or orphaned file. Changes nothing; exit code 1 where something is wrong."""
    from prefvec_ray.registry import open_registry

    found = open_registry(registry).verify(read_bytes=not quick)
    for finding in found.findings:
        needed = f" (needed by {', '.join(finding.needed_by)})" if finding.needed_by else ""
        click.echo(printable(f"{finding.kind}: {finding.path}: {finding.detail}{needed}"))
    click.echo("sound" if found.sound else "not sound")
    sys.exit(0 if found.sound else 1)


@registry_group.command()
@registry_option
@click.option("--apply", is_flag=True, help="Delete; without it only say what would be deleted.")
@click.option(
    "--grace", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds that new orphans stay."
)
def gc(registry: str, apply: bool, grace: float) -> None:
    """Bytes that no version, alias, preset or running replica needs. Works on a full disk."""
    from prefvec_ray.registry import open_registry

    found = open_registry(registry).gc(apply=apply, grace_s=grace)
    for digest, size in found.blobs.items():
        click.echo(f"{digest} {size} bytes")
    for digest, why in found.spared.items():
        click.echo(f"{digest} kept: {why}")
    total = f"{len(found.blobs)} blobs, {sum(found.blobs.values())} bytes"
    click.echo(f"deleted {total}" if apply else f"nothing was deleted; --apply would delete {total}")


@registry_group.command()
@registry_option
@click.argument("ref")
@click.option("--reason", required=True)
def retire(registry: str, ref: str, reason: str) -> None:
    """Allow `gc` to delete the bytes of the pinned version REF; refused while something needs it."""
    from prefvec_ray.registry import open_registry

    open_registry(registry).retire(ref, reason)


@registry_group.command()
@registry_option
def doctor(registry: str) -> None:
    """What may be wrong with the store and with this machine's cache, a line each."""
    from prefvec_ray.registry import open_registry

    checks = open_registry(registry).doctor()
    for check in checks:
        click.echo(printable(f"{check.level}: {check.what}: {check.detail}"))


@registry_group.command()
@registry_option
@click.option("--apply", is_flag=True, help="Mark them as lost; without it only list them.")
def repair(registry: str, apply: bool) -> None:
    """Missing and damaged steps in the histories of aliases and tags. Set an alias again whose newest step was lost."""
    from prefvec_ray.registry import open_registry

    lost = open_registry(registry).repair(apply=apply)
    for key in lost:
        click.echo(printable(key))
    click.echo(f"{len(lost)} steps are {'marked as' if apply else ''} lost".replace("  ", " "))


@registry_group.command()
@registry_option
def stop(registry: str) -> None:
    """End the actor of a registry on the Ray cluster. The store keeps everything; training starts an actor again."""
    from prefvec_ray.common.cluster import join
    from prefvec_ray.registry import stop_registry

    join()
    click.echo(f"stopped ray:{stop_registry(registry)}; the store keeps everything")


@registry_group.command("export")
@registry_option
@click.argument("refs", nargs=-1)
@click.option("--preset", "presets", multiple=True, help="A preset, with the vectors it needs.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--huggingface", is_flag=True, help="One vector as a folder with a model card, for huggingface_hub.")
def export_registry(
    registry: str, refs: tuple[str, ...], presets: tuple[str, ...], out: Path, huggingface: bool
) -> None:
    """Write REFS as one bundle file for another registry."""
    from prefvec_ray.registry import open_registry

    store = open_registry(registry)
    if not huggingface:
        click.echo(store.export_bundle(out, refs, presets=presets))
    elif len(refs) == 1:
        click.echo(store.export_huggingface(refs[0], out))
    else:
        raise InputError(f"--huggingface writes one vector, {len(refs)} were named")


@registry_group.command("import")
@registry_option
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--renumber", is_flag=True, help="Give versions that are taken the next free number.")
def import_registry(registry: str, bundle: Path, renumber: bool) -> None:
    """Publish what BUNDLE holds."""
    from prefvec_ray.registry import open_registry

    for there, here in open_registry(registry, create=True).import_bundle(bundle, renumber=renumber).items():
        click.echo(f"{there} -> {here}")

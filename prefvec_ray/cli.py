"""The `prefvec` command: one short function a command. Everything heavy is imported inside, so that --help is quick."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.text import cell, printable, printable_json


class Commands(click.Group):
    """One line and exit code 2 for an InputError, 1 for a JobError; lists commands in the order of this file.

    So are errors of the operating system that are nobody's bug, such as a full disk. All others keep their traceback.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (InputError, JobError) as error:
            _report(error)
        except OSError as error:
            from prefvec_ray.common.files import os_failure

            known = os_failure(error)
            if known is None:
                raise
            _report(known)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from what is finished", err=True)
            sys.exit(130)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


def _report(error: InputError | JobError) -> NoReturn:
    bad_input = isinstance(error, InputError)
    click.echo(f"{'error' if bad_input else 'failed'}: {error}", err=True)
    sys.exit(2 if bad_input else 1)


registry_option = click.option(
    "--registry",
    required=True,
    envvar="PREFVEC_REGISTRY",
    show_envvar=True,
    help="A folder or bucket, such as runs/demo/registry, or ray:NAME for a registry actor of the Ray cluster.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="prefvec-ray")
def main() -> None:
    """Preference vectors on Ray: train each preference once, choose the balance per deployment or per request."""
    # Bars of our own tell what goes on; those of libraries would only break the lines.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # TRL sets a field of transformers that transformers calls deprecated: nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


@main.command()
@click.option(
    "--world", type=click.Choice(["tiny", "micro"]), default="tiny", help="micro: a smaller one in about a minute"
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", default=None, help="Name of the run folder; default: demo, or demo-micro.")
def demo(world: str, output: Path, name: str | None) -> None:
    """The whole mission on the embedded tiny world: train, search, serve, report. Interrupted, it goes on."""
    from prefvec_ray.demo import MICRO, PipelineConfig, run_pipeline

    config = PipelineConfig() if world == "tiny" else MICRO
    report = run_pipeline(config, output / (name or ("demo" if world == "tiny" else "demo-micro")), _console())
    click.echo(f"report: {report}")


@main.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def train(path: Path) -> None:
    """Train every preference of a config in both polarities and publish the vectors. Finished runs are skipped."""
    from prefvec_ray import commands

    commands.train(_config(path, "prefvec_ray.training", "TrainingConfig"), _console())


@main.command("train-scorer")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see docs/scorers.md.")
def train_scorer(path: Path) -> None:
    """Train a reward model on preference data, and measure it beside chance and length on prompts it never saw."""
    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.scorers import train as room

    config, console = _config(path, "prefvec_ray.scorers.train", "ScorerTrainingConfig"), _console()
    with progress_bar(console, "steps") as tell:
        held_out = room.train_scorer(config, tell)
    room.show(held_out, config, console)


@main.command("eval")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def evaluate(path: Path) -> None:
    """Measure settings of published vectors on prompts: a table, and JSON beside it."""
    from prefvec_ray import commands

    commands.evaluate(_config(path, "prefvec_ray.search", "EvalConfig"), _console())


@main.command()
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def search(path: Path) -> None:
    """Search the coefficients of published vectors; interrupted, it goes on from the settings already measured."""
    from prefvec_ray import commands

    commands.search(_config(path, "prefvec_ray.search", "SearchConfig"), _console())


name_option = click.option(
    "--name", default=None, help="Name of the endpoint on its cluster; default: the application's in FILE, or prefvec."
)


@main.command("roll-out")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="What is served, as a file.")
@name_option
def roll_out(path: Path, name: str | None) -> None:
    """Bring new vector versions, and aliases that moved, to every replica of the running endpoint, or to none."""
    from prefvec_ray.serving import APP
    from prefvec_ray.serving import roll_out as bring
    from prefvec_ray.serving.config import load_application

    named, config = load_application(path)
    lineup = bring(config, name=name or named or APP)
    served = ", ".join(f"{name} = {vector.ref}" for name, vector in lineup.vectors.items())
    click.echo(f"served now: {served} (generation {lineup.generation})")


@main.command()
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
    from prefvec_ray.serving import APP, serve_forever
    from prefvec_ray.serving.config import load_application

    named, config = load_application(path)
    name = name or named or APP
    try:
        serve_forever(config, host=host, port=port, name=name, replace=replace, console=_console())
    except KeyboardInterrupt:
        click.echo(f"interrupted before {name!r} was ready; it is deleted", err=True)
        sys.exit(130)


@main.command()
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
    from prefvec_ray import commands

    chosen = preset if preset else _coefficients(settings)
    commands.export(base, registry, chosen, out, _console(), dtype=dtype, adapter=adapter, overwrite=overwrite)


@main.group(cls=Commands)
def data() -> None:
    """Look at preference data before training on it."""


@data.command("check")
@click.argument("sources", nargs=-1, metavar="[[NAME=]SOURCE]...")
@click.option("--config", "path", type=click.Path(path_type=Path), help="A training config instead of sources.")
@click.option("--test", help="Source of held-out pairs; default: a tenth of the prompts.")
@click.option("--format", help="Name of the format; default: found by itself, see `prefvec data formats`.")
@click.option("--split", help="Split of a hub dataset or of a folder.")
@click.option(
    "--system", type=click.Choice(["keep", "fold"]), default="keep", help="fold: into the first user message."
)
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base: measures lengths in its tokens.")
@click.option("--chat-template", help="A Jinja file, or `transcript`, where the base has no chat template.")
@click.option("--max-length", type=click.IntRange(min=1), default=1024, show_default=True, help="In tokens.")
@click.option("--json", "as_json", is_flag=True)
def check_data(sources: tuple[str, ...], path: Path | None, as_json: bool, **options: Any) -> None:
    """What SOURCEs hold and what is wrong with them; exit code 2 where training on them would be garbage.

    A source is a file, a folder, s3://…, or org/name of the hub. NAME says which preference it is for.
    """
    from prefvec_ray import commands

    config = _config(path, "prefvec_ray.training", "TrainingConfig") if path else None
    found = commands.check_data(sources, config, **options)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        for error in found.errors:
            click.echo(f"error: {printable(error)}", err=True)
    else:
        from prefvec_ray.preferences.show import print_check

        print_check(found, _console())
    sys.exit(2 if found.errors else 0)


@data.command("formats")
def data_formats() -> None:
    """The forms of preference data that can be read."""
    from prefvec_ray.preferences.show import formats_table

    _console().print(formats_table())


@main.group(cls=Commands)
def vectors() -> None:
    """Look at published vectors."""


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
        _fail_for(damaged)
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
    _console().print(table)
    _fail_for(damaged)


@vectors.command("show")
@click.argument("ref")
@registry_option
def show_vector(ref: str, registry: str) -> None:
    """Everything known of one vector, as JSON: `helpful`, `helpful@3` or `helpful@production`."""
    from prefvec_ray.registry import open_registry

    click.echo(printable_json(open_registry(registry).resolve(ref).model_dump(mode="json")))


@main.group("registry", cls=Commands)
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
    _fail_for(store.damaged())


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
    from prefvec_ray.registry import stop_registry
    from prefvec_ray.registry.locate import join_ray

    join_ray()
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


@main.group(cls=Commands)
def robustness() -> None:
    """Robustness that is not overestimated: train a harm classifier, audit a scorer, study TRADES."""


labels_option = click.option("--label", help="Column of the labels in a file; default: label.")
texts_option = click.option(
    "--data", required=True, help="`tiny`, `micro`, or a .csv, .jsonl or .json of labelled texts."
)


@robustness.command("train")
@texts_option
@labels_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML of the recipe, see jobs/configs.")
@click.option("--seed", default=0, show_default=True)
def train_harm_scorer(data: str, label: str | None, out: Path, path: Path | None, seed: int) -> None:
    """Train a harm classifier with TRADES in embedding space, as a scorer folder."""
    from prefvec_ray.common.config import load_config
    from prefvec_ray.robustness import commands
    from prefvec_ray.robustness.scorer import ScorerRecipe

    recipe = load_config(path, ScorerRecipe) if path else ScorerRecipe()
    commands.train(_console(), data=data, label=label, out=out, recipe=recipe, seed=seed)


@robustness.command("audit")
@click.argument("folder", type=click.Path(path_type=Path))
@texts_option
@labels_option
@click.option("--inputs", "count", type=click.IntRange(min=2), default=300, show_default=True, help="Held-out texts.")
@click.option("--epsilon", type=float, help="Default: what the scorer was trained with.")
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML of the ladder, see jobs/configs.")
@click.option("--seed", default=0, show_default=True)
def audit_scorer(
    folder: Path, data: str, label: str | None, count: int, epsilon: float | None, path: Path | None, seed: int
) -> None:
    """Attack the scorer in FOLDER harder and harder, and store the card beside it. Exit code 1 where it fails."""
    from prefvec_ray.common.config import load_config
    from prefvec_ray.robustness import Ladder, commands

    ladder = load_config(path, Ladder) if path else Ladder()
    card = commands.audit(
        _console(), folder=folder, data=data, label=label, count=count, epsilon=epsilon, ladder=ladder, seed=seed
    )
    sys.exit(1 if card.verdict == "fail" else 0)


@robustness.command("study")
@click.option("--preset", type=click.Choice(["quick", "digits", "cifar", "paper"]), help="Default: digits.")
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML of a study of your own instead.")
@click.option("--data", help="A .npz of CIFAR-10 instead of the digits.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/robustness"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file; default: robustness.md in --output.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Runs at once.")
def robustness_study(
    preset: str | None, path: Path | None, data: str | None, output: Path, out: Path | None, workers: int
) -> None:
    """How often TRADES overestimates robustness, beyond plain adversarial training. Interrupted, it goes on."""
    from prefvec_ray.robustness import commands

    commands.study(_console(), preset=preset, config=path, data=data, output=output, out=out, workers=workers)


@main.group(cls=Commands)
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
    _console().print(table)


@keys.command("revoke")
@key_file_option
@click.argument("id")
def revoke_key(path: Path, id: str) -> None:
    """Refuse a key from now on."""
    from prefvec_ray.serving.access import keys

    key = keys.revoke_key(path, id)
    click.echo(f"{key.id} ({key.name}) is revoked")


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


def _config(path: Path, module: str, model: str) -> Any:
    import importlib

    from prefvec_ray.common.config import load_config

    return load_config(path, getattr(importlib.import_module(module), model))


def _fail_for(damaged: list[str]) -> None:
    """JobError where something could not be listed, so that nobody takes the list for complete."""
    if damaged:
        more = f" (and {len(damaged) - 1} more, see `prefvec registry verify`)" if len(damaged) > 1 else ""
        raise JobError(f"the list is not complete: {damaged[0]}{more}")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


if __name__ == "__main__":
    main(prog_name="prefvec")

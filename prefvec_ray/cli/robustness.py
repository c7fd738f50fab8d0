"""`prefvec robustness`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefvec_ray.cli.shared import Commands, console
from prefvec_ray.common.errors import InputError, JobError

if TYPE_CHECKING:
    from rich.console import Console

    from prefvec_ray.robustness import Audit, Ladder
    from prefvec_ray.robustness.scorer import ScorerRecipe


@click.group(cls=Commands)
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
    from prefvec_ray.robustness.scorer import ScorerRecipe

    recipe = load_config(path, ScorerRecipe) if path else ScorerRecipe()
    run_training(console(), data=data, label=label, out=out, recipe=recipe, seed=seed)


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
    from prefvec_ray.robustness import Ladder

    ladder = load_config(path, Ladder) if path else Ladder()
    card = run_audit(
        console(), folder=folder, data=data, label=label, count=count, epsilon=epsilon, ladder=ladder, seed=seed
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
    """How often TRADES overestimates robustness, beyond plain adversarial training. Resumable."""
    run_robustness_study(console(), preset=preset, config=path, data=data, output=output, out=out, workers=workers)


SMALL = 20_000_000
"""Bytes of weights below which a second thread only costs."""


def _one_thread() -> None:
    """On a busy machine, threads that wait for each other made a small model a hundred times slower (measured)."""
    import torch

    torch.set_num_threads(1)


def run_robustness_study(
    console: Console,
    *,
    preset: str | None,
    config: Path | None,
    data: str | None,
    output: Path,
    out: Path | None,
    workers: int,
) -> None:
    """Run what is missing of a study, then write its tables and plots."""
    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.common.config import load_config
    from prefvec_ray.common.paths import check_lasting
    from prefvec_ray.robustness.images import load_images
    from prefvec_ray.robustness.report import write_study
    from prefvec_ray.robustness.study import PRESETS, Study, StudyConfig, run_study

    check_lasting(output=output, out=out)
    if config and preset:
        raise InputError(f"--preset {preset} and --config {config}: give one of the two")
    wanted = load_config(config, StudyConfig) if config else PRESETS[preset or "digits"]
    if data:
        wanted = wanted.model_copy(update={"data": data if data == "digits" else str(Path(data).absolute())})
    if not wanted.data:
        raise InputError(f"preset {preset} wants --data: a .npz of CIFAR-10")
    for classes in {cell.classes for cell in wanted.cells()}:
        load_images(wanted.data, classes, train=wanted.train, watch=wanted.watch, test=wanted.test)
    found = Study(output, wanted)
    failed: dict[str, str] = {}
    if found.missing:
        connect(console)
        with progress_bar(console, "runs") as bar:
            failed = run_study(found, workers=workers, progress=bar)
    path = out or output / "robustness.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_study(found, path)
    console.print(f"{len(found.runs)} runs in {output}: {path}", soft_wrap=True)
    if failed:
        name, reason = next(iter(failed.items()))
        raise JobError(f"{len(failed)} runs failed, such as {name}: {reason}; the same command tries them again")


def run_training(
    console: Console,
    *,
    data: str,
    label: str | None,
    out: Path,
    recipe: ScorerRecipe,
    seed: int,
) -> None:
    """Train a harm classifier on labelled texts."""
    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.robustness.scorer import train_scorer
    from prefvec_ray.robustness.texts import load_texts

    if not recipe.encoder:
        _one_thread()
    train, held = load_texts(data, label)
    console.print(f"{len(train.rows)} texts, {len(held.rows)} held out; labels: {', '.join(train.names)}")
    with progress_bar(console, "steps") as bar:
        about = train_scorer(train, held, recipe, out, seed=seed, progress=bar)
    largest = f"always the largest class: {100 * about.largest_class:.1f}%"
    console.print(f"held-out accuracy {about.held_out_accuracy}; {largest}", soft_wrap=True)
    console.print(f"{out}: audit it with `prefvec robustness audit {out} --data {data}`", soft_wrap=True)


def run_audit(
    console: Console,
    *,
    folder: Path,
    data: str,
    label: str | None,
    count: int,
    epsilon: float | None,
    ladder: Ladder,
    seed: int,
) -> Audit:
    """Audit a scorer on held-out texts; write `audit.json` and `audit.png` into its folder."""
    from matplotlib import rc_context
    from rich.table import Table

    from prefvec_ray.common.cluster import progress_bar
    from prefvec_ray.reports.plots import STYLE
    from prefvec_ray.robustness.plots import ladder_plot
    from prefvec_ray.robustness.scorer import audit_scorer
    from prefvec_ray.robustness.texts import load_texts

    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL:
        _one_thread()
    _, held = load_texts(data, label)
    with progress_bar(console, "rungs") as bar:
        card = audit_scorer(folder, held.sample(count, seed), epsilon=epsilon, ladder=ladder, seed=seed, progress=bar)
    table = Table(title=f"{folder.name} under attack, epsilon {card.epsilon:g} ({card.space})", title_justify="left")
    table.add_column("rung")
    table.add_column("accuracy [95%]", justify="right")
    rates = [card.clean, *card.rungs]
    if card.words:
        edits = f"{card.words.edits} words"
        rates += [
            card.words.random.named(f"{edits}, random slips"),
            card.words.named(f"{edits}, greedy"),
        ]
    for rate in rates:
        table.add_row(rate.name, str(rate))
    console.print(table)
    console.print(f"{card.verdict}: {card.reason}", soft_wrap=True)
    with rc_context(STYLE):
        ladder_plot(card, folder.name).savefig(folder / "audit.png", dpi=110, metadata={"Software": None})
    console.print(f"{folder / 'audit.json'}, {folder / 'audit.png'}", soft_wrap=True)
    return card

"""`prefvec robustness`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefvec_ray.cli.shared import Commands, console
from prefvec_ray.common.errors import InputError, JobError

if TYPE_CHECKING:
    from rich.console import Console

    from prefvec_ray.robustness import Audit, Ladder
    from prefvec_ray.robustness.scorer import ScorerRecipe
    from prefvec_ray.robustness.slices import Slice
    from prefvec_ray.robustness.study import Study


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
@click.option("--attacks", type=click.Choice(["short", "standard"]), help="standard: AutoAttack's budget.")
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="YAML of a ladder of your own, see jobs/configs."
)
@click.option("--seed", default=0, show_default=True)
def audit_scorer(
    folder: Path,
    data: str,
    label: str | None,
    count: int,
    epsilon: float | None,
    attacks: str | None,
    path: Path | None,
    seed: int,
) -> None:
    """Attack the scorer in FOLDER harder and harder, and store the card beside it. Exit code 1 where it fails."""
    from prefvec_ray.common.config import load_config
    from prefvec_ray.robustness.audit import LADDERS, Ladder

    if attacks and path:
        raise InputError(f"--attacks {attacks} and --config {path}: give one of the two")
    ladder = load_config(path, Ladder) if path else LADDERS[attacks or "short"]
    card = run_audit(
        console(), folder=folder, data=data, label=label, count=count, epsilon=epsilon, ladder=ladder, seed=seed
    )
    sys.exit(1 if card.verdict == "fail" else 0)


@robustness.command("study")
@click.option("--preset", type=click.Choice(["quick", "digits", "cifar", "narrow", "paper"]), help="Default: digits.")
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML of a study of your own instead.")
@click.option("--data", help="CIFAR-10 instead of the digits: a .npz, or a folder of train/CLASS/ and test/CLASS/.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/robustness"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file; default: robustness.md in --output.")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at once on the Ray cluster; default: 4.")
@click.option("--budget", help="Run a slice of so long (90s, 8m, 2h) in this process, without Ray; then stop.")
def robustness_study(
    preset: str | None,
    path: Path | None,
    data: str | None,
    output: Path,
    out: Path | None,
    workers: int | None,
    budget: str | None,
) -> None:
    """How often TRADES overestimates robustness, beyond plain adversarial training. Resumable.

    With --budget, exit code 75 says that runs are left: the same command continues, in the middle of an epoch where
    need be.
    """
    if budget and workers:
        raise InputError("--budget and --workers: a slice is one run at a time; give one of the two")
    seconds = _seconds(budget) if budget else None
    found = prepared_study(preset=preset, config=path, data=data, output=output, out=out)
    left = study_slice(console(), found, seconds) if seconds else study_on_ray(console(), found, workers or 4)
    if budget and find_spec("matplotlib") is None:
        console().print("no tables: matplotlib is not installed here; the same command makes them where it is")
    else:
        write_page(console(), found, out or output / "robustness.md")
    if left.failed:
        name, reason = next(iter(left.failed.items()))
        raise JobError(f"{len(left.failed)} runs failed, such as {name}: {reason}; the same command tries them again")
    sys.exit(MORE if left.left else 0)


MORE = 75
"""Exit code of a slice that leaves runs: EX_TEMPFAIL of sysexits.h, "try again"."""
_UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(text: str) -> float:
    """`90s`, `8m` or `2h` in seconds."""
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InputError(f"--budget {text}: expected a time such as 90s, 8m or 2h")
    return seconds


SMALL = 20_000_000
"""Bytes of weights below which a second thread only costs."""


def _one_thread() -> None:
    """On a busy machine, threads that wait for each other made a small model a hundred times slower (measured)."""
    import torch

    torch.set_num_threads(1)


def prepared_study(
    *, preset: str | None, config: Path | None, data: str | None, output: Path, out: Path | None
) -> Study:
    """The study that the options ask for, its images checked, its folder open."""
    from prefvec_ray.common.config import load_config
    from prefvec_ray.common.paths import check_lasting
    from prefvec_ray.robustness.images import load_images
    from prefvec_ray.robustness.study import PRESETS, Study, StudyConfig

    check_lasting(output=output, out=out)
    if config and preset:
        raise InputError(f"--preset {preset} and --config {config}: give one of the two")
    wanted = load_config(config, StudyConfig) if config else PRESETS[preset or "digits"]
    if data:
        wanted = wanted.model_copy(update={"data": data if data == "digits" else str(Path(data).absolute())})
    if not wanted.data:
        raise InputError(f"preset {preset} wants --data: CIFAR-10 as a .npz or a folder")
    for classes in {cell.classes for cell in wanted.cells()}:
        load_images(wanted.data, classes, train=wanted.train, watch=wanted.watch, test=wanted.test, merge=wanted.merge)
    return Study(output, wanted)


def study_on_ray(console: Console, study: Study, workers: int) -> Slice:
    """Run what is missing of a study, several runs at once on Ray."""
    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.robustness.slices import Slice
    from prefvec_ray.robustness.study import run_study

    if not study.missing:
        return Slice()
    connect(console)
    with progress_bar(console, "runs") as bar:
        return Slice(failed=run_study(study, workers=workers, progress=bar))


def study_slice(console: Console, study: Study, seconds: float) -> Slice:
    """Run what is missing of a study in this process until the budget is spent, and say what is left."""
    from prefvec_ray.robustness.run_files import Budget
    from prefvec_ray.robustness.slices import run_slice

    found = run_slice(study, Budget(seconds), lambda line: console.print(line, soft_wrap=True))
    if found.under_way:
        console.print(f"budget spent in {found.under_way}", soft_wrap=True)
    if found.left:
        console.print(
            f"{found.finished} runs finished now, {found.left} of {len(study.config.runs())} left; "
            "the same command continues",
            soft_wrap=True,
        )
    return found


def write_page(console: Console, study: Study, page: Path) -> None:
    """Write the tables and plots of a study."""
    from prefvec_ray.robustness.report import write_study

    page.parent.mkdir(parents=True, exist_ok=True)
    write_study(study, page)
    console.print(f"{len(study.runs)} runs in {study.folder}: {page}", soft_wrap=True)


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
    for words in card.warnings:
        console.print(f"warning: {words}", soft_wrap=True)
    with rc_context(STYLE):
        ladder_plot(card, folder.name).savefig(folder / "audit.png", dpi=110, metadata={"Software": None})
    console.print(f"{folder / 'audit.json'}, {folder / 'audit.png'}", soft_wrap=True)
    return card

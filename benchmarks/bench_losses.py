"""Which of TRL's losses give vectors that add up? Every loss, trained on the tiny world: `make bench-losses`.

    python benchmarks/bench_losses.py --folder bench-results/losses --rounds 1

Each loss trains the two preferences of the demo in both polarities, with the demo's recipe. Losses move a model by
different amounts, so each preference's vector is scaled to the length of sigmoid's before it is used. Then a grid of
settings is measured on the report prompts. An interrupted benchmark is resumed: a loss is a line of `losses.jsonl`.
Prints a Markdown table; a round is a DPO seed.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from prefvec_ray.common.cluster import connect
from prefvec_ray.demo import PREFERENCES, Demo, PipelineConfig
from prefvec_ray.search import Processes, measure
from prefvec_ray.search.pareto import hypervolume
from prefvec_ray.training import Watch, train_vectors
from prefvec_ray.training.recipe import LOSS_TYPES
from prefvec_ray.vectors import load_vector
from prefvec_ray.vectors.inspect import cosine, norm

STEPS = 4
REACH = 2.0
"""The grid goes from 0 to so many times the length of sigmoid's vector, in so many steps a preference."""
VALID = 0.9
PLAIN = "sigmoid"
FURTHER: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
"""What a loss needs beside the demo's recipe."""


def train(demo: Demo, loss: str, seed: int) -> dict[str, Path]:
    """The vectors of one loss, by preference. The reference pass is made once for all losses."""
    dpo = {**demo.training.dpo, "loss_type": loss, **FURTHER.get(loss, {})}
    watch = Watch(evaluations=0, kl_samples=0, wrong_way=None)  # a loss may well move the wrong way
    config = demo.training.model_copy(update={"dpo": dpo, "seeds": [seed], "mixed": False, "watch": watch})
    summary = train_vectors(config)
    return {preference: summary.vector(preference, seed) for preference in PREFERENCES}


def measured(demo: Demo, folders: dict[str, Path], plain: dict[str, Path], samples: int) -> dict[str, Any]:
    """One row of the table: lengths, cosines, and what the settings of the grid score."""
    vectors = {name: load_vector(folder) for name, folder in folders.items()}
    reference = {name: load_vector(folder) for name, folder in plain.items()}
    lengths = {name: norm(phi) for name, phi in vectors.items()}
    scale = {name: norm(reference[name]) / lengths[name] for name in vectors}
    points = [i * REACH / (STEPS - 1) for i in range(STEPS)]
    units = [*((a, b) for a in points for b in points), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    settings = [{name: k * scale[name] for name, k in zip(PREFERENCES, unit, strict=True)} for unit in units]
    found = measure(demo._task("report", folders, samples), settings, Processes(actors=2))
    base, alone, both = found[0], found[-3:-1], found[-1]
    volume = hypervolume(
        [[one.mean(name) for name in PREFERENCES] for one in found if one.mean("valid") >= VALID],
        [base.mean(name) for name in PREFERENCES],
    )
    gains = {name: [one.mean(name) - base.mean(name) for one in (*alone, both)] for name in PREFERENCES}
    return {
        "length": [lengths[name] for name in PREFERENCES],
        "to_plain": [cosine(vectors[name], reference[name]) for name in PREFERENCES],
        "between": cosine(*vectors.values()),
        "gains": gains,
        "hypervolume": volume,
        "valid": both.mean("valid"),
        "error": max(one.stderr or 0.0 for name in PREFERENCES if (one := both.metrics[name])),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table; each figure is the mean over seeds."""
    lines = [
        "| loss | length, helpful and harmless | cosine to sigmoid's | between the two | helpful at (1, 1): measured, "
        "sum of singles | harmless | valid there | hypervolume |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def mean(found: list[dict[str, Any]], get: Any) -> float:
        return statistics.fmean(get(row) for row in found)

    for loss in dict.fromkeys(row["loss"] for row in rows):
        found = [row for row in rows if row["loss"] == loss]
        lengths, cosines = (
            ", ".join(f"{mean(found, lambda row, k=key, i=index: row[k][i]):.2f}" for index in range(2))
            for key in ("length", "to_plain")
        )
        adds = [
            f"{mean(found, lambda row, n=name: row['gains'][n][2]):+.3f}, "
            f"{mean(found, lambda row, n=name: sum(row['gains'][n][:2])):+.3f}"
            for name in PREFERENCES
        ]
        figures = [f"{mean(found, lambda row, k=key: row[k]):.3f}" for key in ("between", "valid", "hypervolume")]
        lines.append(
            f"| `{loss}` | {lengths} | {cosines} | {figures[0]} | {' | '.join(adds)} | {figures[1]} | {figures[2]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-results/losses"))
    parser.add_argument("--world", default="tiny", choices=["tiny", "micro"])
    parser.add_argument("--losses", default=",".join(LOSS_TYPES), help="of " + ", ".join(LOSS_TYPES))
    parser.add_argument("--rounds", type=int, default=1, help="DPO seeds")
    parser.add_argument("--samples", type=int, default=4, help="sampled answers a prompt")
    given = parser.parse_args()
    console = Console()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(PipelineConfig(world=given.world), folder, console)
    connect(console)
    if not (folder / "world").is_dir():
        demo.write_world()
    if not (folder / "base" / "config.json").is_file():
        demo.train_base()
    kept = folder / "losses.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in range(given.rounds):
        plain = train(demo, PLAIN, seed)
        for loss in dict.fromkeys([PLAIN, *given.losses.split(",")]):
            if any((row["loss"], row["seed"]) == (loss, seed) for row in rows):
                continue
            row = {"loss": loss, "seed": seed} | measured(demo, train(demo, loss, seed), plain, given.samples)
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            console.print(json.dumps(row), soft_wrap=True, markup=False, highlight=False)
    ray.shutdown()
    print(table(rows))


if __name__ == "__main__":
    main()

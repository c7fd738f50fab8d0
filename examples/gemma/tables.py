"""The case study's figures as Markdown, from what run.sh has made.

    python examples/gemma/tables.py runs > runs/gemma.md

Differences to the base are paired by prompt; those of more than two standard errors are bold. What a shortened run has
not made is left out.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.artifacts.training import TrainingSummary
from prefvec_ray.common.estimates import Estimate
from prefvec_ray.evaluation import compare
from prefvec_ray.registry import open_registry
from prefvec_ray.vectors import load_vector
from prefvec_ray.vectors.inspect import cosine, norm

METRICS = ("helpful", "harmless", "safe", "refusal", "over_refusal", "refuses_unsafe", "words")
HELD_OUT = ("accuracy_helpful", "accuracy_harmless", "margin_helpful", "margin_harmless")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def told(estimate: Estimate | None, *, bold: bool = False) -> str:
    if estimate is None:
        return "–"
    apart = abs(estimate.mean) > 2 * (estimate.stderr or 0) > 0
    return f"**{estimate}**" if bold and apart else str(estimate)


def training(runs: Path) -> str:
    """A line a run: held-out accuracy and margin, never flipped, on its own preference's pairs; drift; cost."""
    found = [TrainingSummary.model_validate_json((runs / "gemma" / "training.json").read_text())]
    again = runs / "gemma-again" / "training.json"
    if again.is_file():
        found.append(TrainingSummary.model_validate_json(again.read_text()))
    rows = []
    for run in (run for summary in found for run in summary.runs):
        for name, point in run.held_out.items():
            figures = f"{point.accuracy:.3f}", f"{point.margin:+.2f}", str(point.pairs)
            kl = "–" if run.kl is None else f"{run.kl:.2f}"
            rows.append((run.spec.label, name, *figures, kl, str(run.pairs), f"{run.seconds / 60:.0f}"))
    return table(("run", "held out", "accuracy", "margin", "pairs", "KL", "trained on", "minutes"), rows)


def vectors(runs: Path) -> str:
    """Norms, and the cosine of each two published vectors: of two preferences, and of two seeds of one."""
    registry = open_registry(str(runs / "gemma" / "registry"))
    versions = [version.ref for version in registry.list_vectors()]
    loaded = {ref: load_vector(registry.fetch(ref)) for ref in versions}
    rows = [
        (ref, f"{norm(vector):.3f}", *(f"{cosine(vector, other):+.3f}" for other in loaded.values()))
        for ref, vector in loaded.items()
    ]
    return table(("vector", "norm", *(f"cosine with {ref}" for ref in versions)), rows)


def scorers(runs: Path) -> str:
    rows = []
    for name in ("helpful", "harmless"):
        stated = json.loads((runs / f"reward-{name}" / "scorer.json").read_text())["held_out"]
        figures = [Estimate.model_validate(stated[key]) for key in ("accuracy", "longer", "balanced")]
        rows.append((f"reward model, {name}", *(told(figure) for figure in figures), str(stated["pairs"])))
    return table(("scorer", "held-out accuracy", "length alone", "mean over both lengths", "pairs"), rows)


def audit(runs: Path) -> str:
    card = json.loads((runs / "harm" / "audit.json").read_text())
    words: dict[str, Any] = {**card["words"], "name": "3 words, greedy"}
    rows = [
        (rung["name"], f"{rung['mean']:.3f} [{rung['low']:.3f}, {rung['high']:.3f}]", str(rung["n"]))
        for rung in (card["clean"], *card["rungs"], words)
    ]
    return f"{card['verdict']}: {card['reason']}\n\n" + table(("harm classifier under", "accuracy", "texts"), rows)


def settings(folder: Path, against: str) -> str:
    """Every setting, absolute and as a difference to the setting `against`."""
    stored = json.loads((folder / "evaluation.json").read_text())
    found = {name: Evaluation.model_validate(evaluation) for name, evaluation in stored.items()}
    reference = found[against]
    parts = []
    for metrics in (METRICS, HELD_OUT):
        shown = [metric for metric in metrics if metric in reference.metrics]
        if not shown:
            continue
        rows = []
        for name, evaluation in found.items():
            differences = compare(evaluation, reference)
            if name == against:
                rows.append((name, *(told(evaluation.metrics[metric]) for metric in shown)))
            else:
                rows.append((name, *(told(differences[metric], bold=True) for metric in shown)))
        parts.append(table((f"setting, minus {against}", *shown), rows))
    return "\n".join(parts)


def answers(runs: Path) -> str:
    rows = []
    for line in (runs / "gemma-answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        used = ", ".join(f"{name} {eta:g}" for name, eta in answer["preferences"].items() if eta) or "base"
        text = answer["choices"][0]["message"]["content"].strip().replace("\n", " ").replace("|", "\\|")
        rows.append((used, text))
    return table(("coefficients", "answer"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    print("## Training\n\n" + training(runs))
    print("## Vectors\n\n" + vectors(runs))
    print("## Scorers\n\n" + scorers(runs))
    print("## Audit\n\n" + audit(runs))
    print("## Settings\n\n" + settings(runs / "gemma-measured", "base"))
    if (runs / "gemma-seeds" / "evaluation.json").is_file():
        print("## Two seeds\n\n" + settings(runs / "gemma-seeds", "seed 0"))
    print("## Answers\n\n" + answers(runs))


if __name__ == "__main__":
    main()

"""One picture of all runs of a job: how they learned, how far they went, where they ended."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("history", "loss", "loss on training pairs"),
    ("history", "margin", "reward margin on training pairs"),
    ("watched", "accuracy", "accuracy on held-out pairs, never flipped"),
    ("kl", "kl", "KL(base ‖ run), nats an answer"),
    ("history", "chosen_shift", "log-prob of the preferred answer, nats from the base's"),
    ("history", "grad_norm", "gradient norm"),
)


def plot_runs(runs: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of every run's figures by step, from their run.json: positive runs solid, negative ones dashed."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    colors = {key: f"C{number % 10}" for number, key in enumerate(dict.fromkeys(_color_key(run) for run in runs))}
    for axes, (kind, figure_name, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for run in runs:
            points = _points(run, kind)
            spec = run["spec"]
            axes.plot(
                [point["step"] for point in points],
                [point[figure_name] for point in points],
                color=colors[_color_key(run)],
                linestyle="-" if spec["polarity"] == "positive" else "--",
                label=f"{spec['preference']}{'+' if spec['polarity'] == 'positive' else '-'} seed {spec['seed']}",
            )
        if kind == "watched":
            axes.axhline(0.5, color="0.6", linewidth=0.8)
            axes.set_ylim(0, 1)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def _color_key(run: dict[str, Any]) -> tuple[str, int]:
    return run["spec"]["preference"], run["spec"]["seed"]


def _points(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    if kind == "history":
        return run["history"]
    watched = run["watched"]
    found = watched.get("kl", []) if kind == "kl" else next((p for name, p in watched.items() if name != "kl"), [])
    return [point for point in found if point.get(kind, 0.0) is not None]

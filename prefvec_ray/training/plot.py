"""One picture of all runs of a job: how they learned, how far they went, where they ended."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prefvec_ray.artifacts.training import KL, Drift, HeldOutPoint, RunResult, TrainingPoint

PANELS = (
    ("history", "loss", "loss on training pairs"),
    ("history", "margin", "reward margin on training pairs"),
    ("watched", "accuracy", "accuracy on held-out pairs, never flipped"),
    (KL, "kl", "KL(base ‖ run), nats an answer"),
    ("history", "chosen_shift", "log-prob of the preferred answer, nats from the base's"),
    ("history", "grad_norm", "gradient norm"),
)


def plot_runs(runs: list[RunResult], path: Path) -> None:
    """Write a PNG of every run's figures by step: positive runs solid, negative ones dashed."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    colors = {key: f"C{number % 10}" for number, key in enumerate(dict.fromkeys(run.spec.vector_key for run in runs))}
    for axes, (kind, field, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for run in runs:
            points = [(point.step, getattr(point, field)) for point in _points(run, kind)]
            points = [(step, value) for step, value in points if value is not None]
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=colors[run.spec.vector_key],
                linestyle="-" if run.spec.polarity == "positive" else "--",
                label=run.spec.label,
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


def _points(run: RunResult, kind: str) -> Sequence[TrainingPoint | HeldOutPoint | Drift]:
    if kind == "history":
        return run.history
    if kind == KL:
        return run.watched.get(KL, [])
    return next((points for name, points in run.watched.items() if name != KL), [])

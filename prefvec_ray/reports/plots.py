"""The report's pictures. The colours are Okabe and Ito's, safe for the colour-blind; shapes and labels
repeat them."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from prefvec_ray.artifacts.evaluation import Curve, Evaluation, Metric, SearchSummary, SeedResults
from prefvec_ray.artifacts.training import MIXED
from prefvec_ray.evaluation.control import mean_path

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "svg.hashsalt": "prefvec",
}

_MARKS: dict[str, list[tuple[str, str, int]]] = {
    "base": [(BLACK, "*", 150)],
    "single": [(GREEN, marker, 60) for marker in "^v<>h8"],
    "mixed": [(ORANGE, "s", 55)],
    "soup": [(PURPLE, "P", 65)],
    "control": [(RED, "X", 65), (RED, "d", 60)],
    "vectors": [(BLUE, "o", 34)],
}
"""Kind of setting -> colour, marker and size of its first, second ... point."""


def tradeoff(seeds: Sequence[SeedResults], axes: Mapping[str, str], metrics: Mapping[str, Metric]) -> Figure:
    """Two objectives against each other, one panel a seed: the grid of coefficients as a net, the baselines
    as marks.

    `axes` maps two preferences to their metrics: the first goes right, the second up. Coefficients of
    others are 0 in the net.
    """
    (p, x), (q, y) = axes.items()
    figure, panels = _panels(len(seeds), width=5.4, height=4.9, share=True)
    for panel, results in zip(panels, seeds, strict=False):
        _net(panel, dict(_plane(results.grid, p, q)), x, y)
        counts: dict[str, int] = {}
        for measured in results.table:
            kind = measured.setting.kind
            styles = _MARKS[kind]
            colour, marker, size = styles[counts.get(kind, 0) % len(styles)]
            counts[kind] = counts.get(kind, 0) + 1
            label: str | None = measured.setting.name
            if kind == "vectors":  # one entry for all: the net says where they are
                label = "vectors, settings of the table" if counts[kind] == 1 else None
            _dot(panel, measured.evaluation, x, y, colour, marker, size, label)
        panel.set_xlabel(f"{x} ({_word(metrics[x])} →)")
        if panel is panels[0]:
            panel.set_ylabel(f"{y} ({_word(metrics[y])} ↑)")
        panel.set_title(f"DPO seed {results.seed}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
    figure.suptitle(f"What the coefficients do: {x} against {y}", fontsize=12)
    return figure


def settings(results: SeedResults, metrics: Mapping[str, Metric]) -> Figure:
    """The comparison table as a picture: a panel a metric, a line a setting; dashed where the base is."""
    rows = list(reversed(results.table))
    names = [name for name in metrics if any(row.evaluation.metrics.get(name) is not None for row in rows)]
    figure, panels = _panels(len(names), width=4.4, height=0.26 * len(rows) + 1.0, share=False)
    base = next((row.evaluation for row in rows if row.setting.kind == "base"), None)
    for place, (panel, name) in enumerate(zip(panels, names, strict=True)):
        for height, row in enumerate(rows):
            value = row.evaluation.metrics.get(name)
            if value is not None:
                colour, marker, _ = _MARKS[row.setting.kind][0]
                panel.errorbar(value.mean, height, xerr=value.stderr or 0, fmt=marker, color=colour, ms=6, elinewidth=1)
        if base is not None and base.metrics.get(name) is not None:
            panel.axvline(base.mean(name), color=GREY, lw=0.8, ls="--")
        first = place % 3 == 0
        panel.set_yticks(range(len(rows)), [row.setting.name for row in rows] if first else [""] * len(rows))
        direction = metrics[name].direction
        better = "" if direction is None else f" ({_word(metrics[name])})"
        panel.set_title(name + better, fontsize=10)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
    return figure


def _net(panel: Axes, by_eta: Mapping[tuple[float, float], Evaluation], x: str, y: str) -> None:
    if not by_eta:
        return
    etas = (sorted({eta[0] for eta in by_eta}), sorted({eta[1] for eta in by_eta}))
    label: str | None = "preference vectors, coefficients on a grid"
    for axis in (0, 1):
        for fixed in etas[1 - axis]:
            points = [(moving, fixed) if axis == 0 else (fixed, moving) for moving in etas[axis]]
            line = [by_eta[point] for point in points if point in by_eta]
            panel.plot(
                [e.mean(x) for e in line], [e.mean(y) for e in line],
                color=SKY, lw=1.0, alpha=0.8, zorder=1, marker=".", ms=4, label=label,
            )  # fmt: skip
            label = None
    path = [eta for eta in sorted(by_eta) if eta[0] == eta[1] and eta[0] >= 0]
    if len(path) > 1:
        panel.plot(
            [by_eta[eta].mean(x) for eta in path], [by_eta[eta].mean(y) for eta in path],
            color=BLUE, lw=2.2, zorder=2, label="preference vectors, all coefficients from 0 up together",
        )  # fmt: skip
    for eta in {(a, b) for a in (etas[0][0], etas[0][-1]) for b in (etas[1][0], etas[1][-1])} & set(by_eta):
        _note(panel, f"({eta[0]:g}, {eta[1]:g})", by_eta[eta].mean(x), by_eta[eta].mean(y))


def heatmaps(
    seeds: Sequence[SeedResults], preferences: Sequence[str], metrics: Mapping[str, Metric], *, show: Sequence[str]
) -> Figure:
    """Each metric of `show` over the grid of two coefficients, mean over the seeds; the lines of
    coefficient 0 are framed."""
    p, q = preferences
    figure, panels = _panels(len(show), width=3.5, height=3.3, columns=3)
    for panel, name in zip(panels, show, strict=False):
        cells: dict[tuple[float, float], list[float]] = {}
        for eta, e in (point for results in seeds for point in _plane(results.grid, p, q)):
            known = cells.setdefault(eta, [])
            if e.metrics[name] is not None:
                known.append(e.mean(name))
        etas_p, etas_q = sorted({eta[0] for eta in cells}), sorted({eta[1] for eta in cells})
        table = [[_average(cells.get((a, b), [])) for a in etas_p] for b in etas_q]
        metric = metrics[name]
        colours = "cividis_r" if metric.direction == "minimize" else "cividis"
        image = panel.imshow(table, origin="lower", cmap=colours, aspect="auto", vmin=metric.low, vmax=metric.high)
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                dark = sum(image.to_rgba(np.array([value]))[0, :3]) < 1.5
                text = "–" if math.isnan(value) else f"{value:.2f}" if abs(value) < 1.005 else f"{value:.1f}"
                panel.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        if 0.0 in etas_p:
            _frame(panel, (etas_p.index(0.0) - 0.5, -0.5), 1, len(etas_q))
        if 0.0 in etas_q:
            _frame(panel, (-0.5, etas_q.index(0.0) - 0.5), len(etas_p), 1)
        panel.set_xticks(range(len(etas_p)), [f"{eta:g}" for eta in etas_p])
        panel.set_yticks(range(len(etas_q)), [f"{eta:g}" for eta in etas_q])
        panel.set_xlabel(f"coefficient of {p}")
        panel.set_ylabel(f"coefficient of {q}")
        better = {"maximize": "higher is better", "minimize": "lower is better", None: ""}[metric.direction]
        panel.set_title(f"{name}" + (f"\n({better})" if better else "\n"), fontsize=10)
        for spine in panel.spines.values():
            spine.set_visible(False)
    of = f"mean of {len(seeds)} DPO seeds" if len(seeds) > 1 else f"DPO seed {seeds[0].seed}"
    figure.suptitle(f"Over the coefficients, {of}; brighter is better where marked; framed: coefficient 0", fontsize=12)
    return figure


def control(seeds: Sequence[SeedResults], objectives: Mapping[str, str], metrics: Mapping[str, Metric]) -> Figure:
    """Every objective against each coefficient, mean over the others and the seeds; the band spans the
    seeds."""
    figure, panels = _panels(len(objectives), width=4.2, height=3.4, share=True)
    colours = [BLUE, RED, GREEN, PURPLE, ORANGE, SKY]
    for panel, preference in zip(panels, objectives, strict=True):
        for (own, metric), colour in zip(objectives.items(), colours, strict=False):
            paths = [mean_path(results.grid, preference, metric) for results in seeds]
            etas = [eta for eta, _ in paths[0]]
            columns = list(zip(*([value for _, value in path] for path in paths), strict=True))
            width = 2.4 if own == preference else 1.2
            panel.plot(etas, [_average(column) for column in columns], color=colour, lw=width, marker=".", label=metric)
            panel.fill_between(
                etas, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, lw=0
            )
        panel.set_xticks(etas, [f"{eta:g}" for eta in etas])
        panel.set_xlabel(f"coefficient of {preference}")
    handles, labels = panels[0].get_legend_handles_labels()
    arrows = {"maximize": " (higher is better)", "minimize": " (lower is better)", None: ""}
    figure.legend(
        handles,
        [label + arrows[metrics[label].direction] for label in labels],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    figure.suptitle("Turning one coefficient, mean over the others; thick: the preference's own metric", fontsize=12)
    return figure


def training(curves: Sequence[Curve]) -> Figure:
    """Loss and accuracy of every run; colour is the preference, dashes the negative polarity, seeds share a
    style."""
    figure, panels = _panels(2, width=5.2, height=3.7)
    preferences = list(dict.fromkeys(curve.preference for curve in curves))
    colours = dict(zip(preferences, [BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK] * 2, strict=False))
    seen: set[tuple[str, str]] = set()
    for curve in curves:
        key = (curve.preference, curve.polarity)
        sign = "" if curve.preference == MIXED else {"positive": "+", "negative": "−"}.get(curve.polarity, "")
        label = f"{curve.preference}{sign}" if key not in seen else None
        seen.add(key)
        dash = "--" if curve.polarity == "negative" else "-"
        for panel, values in zip(panels, (curve.loss, curve.accuracy), strict=True):
            panel.plot(curve.steps, values, dash, color=colours[curve.preference], lw=1.5, alpha=0.85, label=label)
    panels[0].set_title("DPO loss (0.693 = no preference learned)")
    panels[1].set_title("pairs ranked right (0.5 = chance)")
    panels[0].axhline(0.6931, color=GREY, lw=0.8, ls=":")
    panels[1].axhline(0.5, color=GREY, lw=0.8, ls=":")
    for panel in panels:
        panel.set_xlabel("training step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))), fontsize=9)
    figure.suptitle("Training the preferences", fontsize=12)
    return figure


def front(search: SearchSummary, metrics: Mapping[str, Metric]) -> Figure:
    """What the search found in its first two objectives, and how the dominated volume grew."""
    x, y = search.objectives[:2] if len(search.objectives) > 1 else (search.objectives[0], search.objectives[0])
    figure, (left, right) = _panels(2, width=5.2, height=4.3)
    best = sorted(search.front, key=lambda e: e.mean(x))
    others = [e for e in search.trials if e not in best]
    for breaks, marker, label in ((False, "o", "beaten by the front"), (True, "x", "breaks a limit")):
        some = [e for e in others if bool(search.broken(e, metrics)) is breaks]
        if some:
            xs, ys = [e.mean(x) for e in some], [e.mean(y) for e in some]
            left.scatter(xs, ys, s=18, color=GREY, marker=marker, lw=1.2, label=label)
    left.plot([e.mean(x) for e in best], [e.mean(y) for e in best], color=BLUE, lw=1.4, zorder=2)
    for index, e in enumerate(best):
        _dot(left, e, x, y, BLUE, "o", 34, "Pareto front" if index == 0 else None)
    _dot(left, search.base, x, y, BLACK, "*", 150, "base model")
    chosen = next((e for e in best if e.coefficients == search.recommended), None)
    if chosen is not None:
        left.scatter(
            [chosen.mean(x)],
            [chosen.mean(y)],
            s=230,
            facecolors="none",
            edgecolors=RED,
            lw=2,
            zorder=5,
            label="recommended",
        )
    left.set_xlabel(f"{x} ({_word(metrics[x])})")
    left.set_ylabel(f"{y} ({_word(metrics[y])})")
    left.set_title("Settings tried, on the search prompts")
    history = search.hypervolume_history
    right.step(range(1, len(history) + 1), history, where="post", color=BLUE, lw=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("settings measured")
    right.set_ylabel("volume dominated by the front")
    right.set_title("Is more searching worth it?")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Searching for coefficients", fontsize=12)
    return figure


def _plane(grid: Sequence[Evaluation], p: str, q: str) -> Iterator[tuple[tuple[float, float], Evaluation]]:
    """The points of a grid where only the coefficients of `p` and `q` are not 0, with those two."""
    for e in grid:
        if not any(value for name, value in e.coefficients.items() if name not in (p, q)):
            yield (e.coefficients.get(p, 0.0), e.coefficients.get(q, 0.0)), e


def save(draw: Callable[[], Figure], folder: Path, name: str) -> str:
    """Draw, and write `<name>.svg` and `<name>.png` into `folder`; returns `name`."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        figure.savefig(folder / f"{name}.png", dpi=140, bbox_inches="tight")
    return name


def _panels(
    count: int, *, width: float, height: float, columns: int = 3, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, sizes in inches; no pyplot, so nothing global is touched."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.9), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels[:count]


def _dot(panel: Axes, e: Evaluation, x: str, y: str, colour: str, marker: str, size: float, label: str | None) -> None:
    errors = [estimate.stderr if (estimate := e.metrics[name]) is not None else None for name in (x, y)]
    panel.errorbar(
        e.mean(x),
        e.mean(y),
        xerr=errors[0] or 0,
        yerr=errors[1] or 0,
        fmt="none",
        ecolor=colour,
        elinewidth=0.9,
        alpha=0.7,
        zorder=3,
    )
    panel.scatter(
        [e.mean(x)], [e.mean(y)], s=size, color=colour, marker=marker, label=label, zorder=4, edgecolors="white", lw=0.6
    )


def _note(panel: Axes, text: str, x: float, y: float) -> None:
    halo = [withStroke(linewidth=2.5, foreground="white")]
    panel.annotate(
        text, (x, y), xytext=(5, -11), textcoords="offset points", fontsize=8.5, color=BLUE, path_effects=halo, zorder=6
    )


def _frame(panel: Axes, corner: tuple[float, float], width: float, height: float) -> None:
    panel.add_patch(Rectangle(corner, width, height, fill=False, lw=1.8, ls="--", edgecolor=ORANGE, clip_on=False))


def _word(metric: Metric) -> str:
    return "higher is better" if metric.direction == "maximize" else "lower is better"


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def comparison_fronts(
    differences: Mapping[str, tuple[str, float, float]],
    fronts: Mapping[tuple[str, int, str], Sequence[Mapping[str, float]]],
    bases: Mapping[tuple[str, int], Mapping[str, float]],
    objectives: Sequence[str],
) -> Figure:
    """Methods against each other: how each one's hypervolume differs from the first one's, and its fronts.

    Args:
        differences: method -> title, difference and error.
        fronts: (job, seed, method) -> the objectives of the settings on its front. The first two objectives are drawn,
            for the first two (job, seed).
        bases: the base's objectives by (job, seed).
    """
    places = list(bases)[:2] if len(objectives) > 1 else []
    figure, panels = _panels(1 + len(places), width=5.2, height=0.32 * len(differences) + 2.4, share=False)
    marks = dict(
        zip(differences, itertools.cycle(itertools.product("os^Dv", (BLUE, RED, GREEN, PURPLE, ORANGE))), strict=False)
    )
    for height, (method, (_, difference, error)) in enumerate(reversed(list(differences.items()))):
        marker, colour = marks[method]
        panels[0].errorbar(difference, height, xerr=2 * error, fmt=marker, color=colour, ms=6, elinewidth=1)
    panels[0].set_yticks(range(len(differences)), list(differences)[::-1])
    panels[0].axvline(0, color=GREY, lw=0.8, ls="--")
    panels[0].set_title(f"hypervolume less that of {next(iter(differences))}, ± 2 errors")
    for panel, place in zip(panels[1:], places, strict=True):
        x, y = objectives[:2]
        for method, (marker, colour) in marks.items():
            line = sorted((means[x], means[y]) for means in fronts[*place, method])
            if line:
                panel.plot(*zip(*line, strict=True), marker=marker, color=colour, ms=4, lw=0.9, label=method)
        panel.scatter(bases[place][x], bases[place][y], s=150, color=BLACK, marker="*", label="base", zorder=4)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.set_title(f"{place[0]}, DPO seed {place[1]}: fronts on the report prompts")
    if places:
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    return figure

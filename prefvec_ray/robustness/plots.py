"""The study's pictures, and a card's."""

from collections.abc import Callable
from statistics import fmean

from matplotlib.figure import Figure

from prefvec_ray.reports.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from prefvec_ray.robustness.audit import BLACK_BOX, CLEAN, ENSEMBLE, Audit
from prefvec_ray.robustness.intervals import Gap
from prefvec_ray.robustness.study import Cell, Runs, Study, gap_of
from prefvec_ray.robustness.train import Moment


def gaps_plot(runs: Runs) -> Figure:
    """Every run a dot, a row a cell; the bar is the mean with its interval over seeds."""
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(runs)), layout="constrained")
    panel = figure.subplots()
    for row, (cell, found) in enumerate(reversed(list(runs.items()))):
        colour = _colour(cell)
        gaps = [100 * gap_of(run) for run in found]
        mean = Gap.over_runs("", gaps)
        if len(gaps) > 1:
            panel.plot([mean.low, mean.high], [row, row], color=colour, lw=2, alpha=0.5)
        panel.plot([mean.mean], [row], "|", color=colour, ms=14, mew=2)
        panel.scatter(gaps, [row] * len(gaps), color=colour, s=22, zorder=3)
    dots = [100 * gap_of(run) for found in runs.values() for run in found]
    panel.set_xlim(min([-5.0, *dots]) - 2, max(dots) + 10)  # an interval of two runs would take all the room
    panel.axvline(0, color=GREY, lw=0.8)
    panel.set_yticks(range(len(runs)), [cell.name for cell in reversed(list(runs))], fontsize=8)
    panel.set_xlabel("PGD minus ensemble, points")
    figure.suptitle("Every run a dot; blue: TRADES, orange: plain adversarial training, green: with noise", fontsize=10)
    return figure


def curves_plot(study: Study, runs: Runs) -> Figure:
    """Watched images: the gap, relative FOSC and SGCS through training, mean over the seeds, in the first grid."""
    first = study.config.model_copy(update={"grids": study.config.grids[:1]}).cells()
    cells = [cell for cell in first if cell in runs]
    largest = max((cell.recipe.epsilon for cell in cells), default=0)
    lowest = min((cell.recipe.beta for cell in cells), default=0)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    measures: list[tuple[str, Callable[[Moment], float | None]]] = [
        ("PGD minus strong, points", lambda moment: None if moment.gap is None else 100 * moment.gap),
        ("FOSC / (epsilon x gradient's L1)", lambda moment: moment.fosc_relative),
        ("SGCS", lambda moment: moment.sgcs),
    ]
    for panel, (title, measure) in zip(panels, measures, strict=True):
        for cell in cells:
            columns: dict[int, list[float]] = {}
            for moment in (moment for run in runs[cell] for moment in run.curve):
                value = measure(moment)
                if value is not None:
                    columns.setdefault(moment.epoch, []).append(value)
            style = "-" if cell.recipe.epsilon == largest else ":"
            colour = _colour(cell) if cell.recipe.beta == lowest else PURPLE
            means = [fmean(values) for values in columns.values()]
            panel.plot(list(columns), means, style, color=colour, label=cell.name, marker=".", ms=4)
        panel.set_xlabel("epoch")
        panel.set_title(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def ladder_plot(card: Audit, title: str) -> Figure:
    """The rungs of one audit with their intervals; words at the end where they were attacked."""
    rates = [card.clean, *card.rungs]
    if card.words:
        rates += [card.words.random.named("words, random"), card.words.named("words, greedy")]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panel = figure.subplots()
    colours = {BLACK_BOX: ORANGE, ENSEMBLE: RED, CLEAN: BLACK}
    for place, rate in enumerate(rates):
        error = [[max(0.0, rate.mean - rate.low)], [max(0.0, rate.high - rate.mean)]]
        panel.errorbar(place, rate.mean, yerr=error, fmt="o", capsize=4, color=colours.get(rate.name, BLUE))
    if card.ladder.floor is not None:
        panel.axhline(card.ladder.floor, color=GREY, lw=0.8, ls="--")
    panel.set_xticks(range(len(rates)), [rate.name.replace(" ", "\n") for rate in rates])
    panel.set_ylim(0, 1)
    panel.set_ylabel("accuracy")
    panel.set_title(f"{title}: {card.verdict} ({card.finding}), epsilon {card.epsilon:g}")
    return figure


def _colour(cell: Cell) -> str:
    if cell.recipe.remedy:
        return GREEN
    return BLUE if cell.recipe.method == "trades" else ORANGE

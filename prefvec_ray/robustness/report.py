"""The study as tables and plots, all computed from the runs."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from scipy.stats import pearsonr

from prefvec_ray.reports.plots import STYLE
from prefvec_ray.robustness.audit import BLACK_BOX, CLEAN, ENSEMBLE, MASKING, PGD, STRONG, Ladder
from prefvec_ray.robustness.intervals import Gap, Rate
from prefvec_ray.robustness.plots import curves_plot, gaps_plot
from prefvec_ray.robustness.study import Cell, Run, Runs, Study, by_cell, gap_of, learned
from prefvec_ray.robustness.train import healed

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
PAPER = {"batch": "smaller", "beta": "smaller", "lr": "larger", "classes": "larger"}
"""Which way overestimation grows, by arXiv 2410.07675."""


def control_of(cell: Cell, runs: Runs) -> Cell | None:
    """The cell of plain adversarial training that differs in the method alone."""
    wanted = {**cell.factors, "method": "adversarial", "beta": None, "noise": None}
    return next((other for other in runs if other.factors == wanted and other != cell), None)


def paired(name: str, cell: Cell, other: Cell, runs: Runs, value: Callable[[Run], float]) -> Gap | None:
    """`value` in `cell` minus in `other`, over the seeds that both have; None below two."""
    there = {run.seed: value(run) for run in runs[other]}
    values = [value(run) - there[run.seed] for run in runs[cell] if run.seed in there]
    return Gap.over_runs(name, values) if len(values) > 1 else None


def study_markdown(study: Study, images: str = "images") -> str:
    """The block of tables. `images` is where the plots lie, seen from the file that the block goes into."""
    runs = by_cell(study)
    if not runs:
        return _unlearned(study) or "No run has finished yet.\n"
    parts = [
        _summary(study, runs),
        _cells(runs, study.config.ladder),
        _claims(runs),
        _remedy(runs),
        _signals(runs),
        _pictures(images),
    ]
    return "\n".join(part for part in parts if part)


def write_study(study: Study, out: Path) -> None:
    """Write the plots beside `out` in `images/`, and the tables into `out`: between its marks where it has them, so
    that the text around them stays; as the whole file where it is not there yet."""
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    runs = by_cell(study)
    with rc_context(STYLE):
        for name, figure in (("gaps", gaps_plot(runs)), ("curves", curves_plot(study, runs))) if runs else ():
            figure.savefig(images / f"robustness-{name}.png", dpi=110, metadata={"Software": None})
    block = f"{BEGIN}\n{study_markdown(study)}{END}"
    text = out.read_text("utf-8") if out.is_file() else ""
    if BEGIN in text and END in text:
        text = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text}\n{block}\n".lstrip()
    out.write_text(text, "utf-8")


def _summary(study: Study, runs: Runs) -> str:
    config, wanted = study.config, len(study.config.runs())
    minutes = sum(run.seconds for run in study.runs) / 60
    data = "the digits" if config.data == "digits" else "CIFAR-10"
    tolerance = 100 * config.ladder.tolerance
    lines = [
        f"{len(study.runs)} of {wanted} runs of {config.epochs} epochs on {data} with the {config.network} network, "
        f"{minutes:.0f} minutes of run time in all; {config.test} test images, the same for every run. Accuracies in "
        "per cent, gaps in points; `±` and `[ ]` are 95% intervals, over seeds unless said otherwise. A run counts as "
        f"overestimated where the interval (over images) of {config.ladder.weak} minus ensemble lies above "
        f"{tolerance:g} points.",
        "",
    ]
    for method, name in (("trades", "TRADES"), ("adversarial", "Plain adversarial training")):
        for epsilon in sorted({cell.recipe.epsilon for cell in runs}):
            cells = [cell for cell in runs if (cell.recipe.method, cell.recipe.epsilon) == (method, epsilon)]
            group = [run for cell in cells if not cell.recipe.remedy for run in runs[cell]]
            if group:
                over = sum(run.overestimated for run in group)
                masking = Gap.over_runs("", [run.audit.gap(MASKING).mean for run in group])
                lines.append(
                    f"- {name}, epsilon {epsilon:.3g}: overestimated in {over} of {len(group)} runs "
                    f"({Rate.counted('', over, len(group))}); masked gradients shown in {_masked(group)}; "
                    f"{config.ladder.strong} minus black box is {masking}."
                )
    return "\n".join(lines) + f"\n{_unlearned(study)}"


def _unlearned(study: Study) -> str:
    collapsed = [f"{run.cell.name} (seed {run.seed})" for run in study.runs if not learned(run)]
    return f"- Left out of everything below, since they did not learn: {'; '.join(collapsed)}.\n" if collapsed else ""


def _masked(group: Sequence[Run]) -> str:
    return f"{sum(run.audit.finding == 'masked gradients' for run in group)}/{len(group)}"


def _cells(runs: Runs, ladder: Ladder) -> str:
    rows = []
    for cell, found in runs.items():
        control = control_of(cell, runs)
        beyond = paired("beyond", cell, control, runs, gap_of) if control else None
        over = sum(run.overestimated for run in found)
        rows.append(
            [
                cell.name,
                len(found),
                *(_percent(fmean(run.audit.rung(rung).mean for run in found)) for rung in _RUNGS),
                _plus_minus(Gap.over_runs("", [gap_of(run) for run in found])),
                _spread([gap_of(run) for run in found]),
                f"{over}/{len(found)}",
                _interval(beyond) if control else "–",
                _masked(found),
                f"{sum(healed(list(run.curve)) for run in found)}/{len(found)}",
            ]
        )
    strong = f"PGD-{ladder.strong_steps} x{ladder.restarts}"
    head = [
        "cell", "runs", "clean", ladder.weak, strong, "black box", "ensemble", "gap", "s.d. of seeds",
        "overestimated", "gap beyond control", "masked", "healed itself",
    ]  # fmt: skip
    note = (
        f"*gap*: {ladder.weak} minus ensemble. *gap beyond control*: minus that of plain adversarial training in the "
        f"same setting, paired by seed. *masked*: the black box beats {ladder.strong}, by its interval over images. "
        "*healed itself*: overestimated at some epoch, not at the last, and the strong accuracy did not fall (on the "
        "watched images, with a shorter attack).\n"
    )
    return f"### Cells\n\n{_table(head, rows)}\n{note}"


_RUNGS = (CLEAN, PGD, STRONG, BLACK_BOX, ENSEMBLE)


def _neighbours(runs: Runs, method: str) -> Iterator[tuple[str, Cell, Cell]]:
    """Pairs of cells without noise that differ in one factor alone: (factor, where it is lower, where it is higher)."""
    cells = [cell for cell in runs if cell.recipe.method == method and not cell.recipe.remedy]
    for a in cells:
        for b in cells:
            differing = [name for name, value in a.factors.items() if value != b.factors[name]]
            if len(differing) == 1 and a.factors[differing[0]] < b.factors[differing[0]]:
                yield differing[0], a, b


def _claims(runs: Runs) -> str:
    rows = []
    for factor, a, b in _neighbours(runs, "trades"):
        towards, away = (a, b) if PAPER.get(factor) == "smaller" else (b, a)
        change = paired("change", towards, away, runs, gap_of)
        if change is None:
            continue
        beyond = _beyond(towards, away, runs)
        fixed = ", ".join(f"{k} {v:g}" for k, v in a.factors.items() if isinstance(v, int | float) and k != factor)
        rows.append(
            [
                f"{factor} {away.factors[factor]:g} → {towards.factors[factor]:g}",
                fixed,
                "grows" if factor in PAPER else "–",
                f"{_interval(change)} ({change.n})",
                f"{_interval(beyond)} ({beyond.n})" if beyond else "–",
                _seen(change, beyond, factor in PAPER),
            ]
        )
    if not rows:
        return ""
    head = ["change", "at", "paper: gap", "TRADES' gap changes by (seeds)", "beyond the control's change", "seen here"]
    note = "Paired by seed. Intervals are not corrected for there being several rows.\n"
    return f"### What moves the gap\n\n{_table(head, rows)}\n{note}"


def _beyond(towards: Cell, away: Cell, runs: Runs) -> Gap | None:
    """How much more the gap changes than that of plain adversarial training does between the same settings."""
    controls = control_of(towards, runs), control_of(away, runs)
    if controls[0] is None or controls[1] is None or controls[0] == controls[1]:
        return None
    gaps = [{run.seed: gap_of(run) for run in runs[cell]} for cell in (towards, away, controls[0], controls[1])]
    seeds = set.intersection(*(set(part) for part in gaps))
    a, b, c, d = gaps
    values = [(a[seed] - b[seed]) - (c[seed] - d[seed]) for seed in sorted(seeds)]
    return Gap.over_runs("beyond", values) if len(values) > 1 else None


def _seen(change: Gap, beyond: Gap | None, claimed: bool) -> str:
    if change.high < 0:
        return "the opposite" if claimed else "shrinks"
    if change.low <= 0:
        return "not told apart from noise"
    plain = "yes" if claimed else "grows"
    return f"{plain}, not shown beyond the control" if beyond and beyond.low <= 0 else plain


def _remedy(runs: Runs) -> str:
    rows = []
    for cell in (cell for cell in runs if cell.recipe.remedy):
        without = next((other for other in runs if other.factors == {**cell.factors, "noise": None}), None)
        if without is None:
            continue
        gap = paired("gap", cell, without, runs, gap_of)
        strong = paired("ensemble", cell, without, runs, lambda run: run.audit.rung(ENSEMBLE).mean)
        clean = paired("clean", cell, without, runs, lambda run: run.audit.clean.mean)
        if gap is None or strong is None or clean is None:
            continue
        noisy = fmean(moment.noise for run in runs[cell] for moment in run.curve)
        if gap.high >= 0:
            verdict = "no: the gap is not shown to shrink"
        elif strong.mean < 0:
            verdict = "no: the gap shrinks, and so does what stands under the ensemble"
        else:
            verdict = "yes"
        rows.append([cell.name, gap.n, _interval(gap), _interval(strong), _interval(clean), _percent(noisy), verdict])
    if not rows:
        return ""
    head = ["cell", "pairs", "gap", "ensemble", "clean", "noisy epochs, %", "healing?"]
    note = (
        "Against the same cell without noise, paired by seed. Healing: the gap shrinks, the ensemble's accuracy does "
        "not fall.\n"
    )
    return f"### The noise remedy\n\n{_table(head, rows)}\n{note}"


def _signals(runs: Runs) -> str:
    """Whether what can be measured cheaply predicts which runs are overestimated."""
    rows = []
    epsilons = sorted({cell.recipe.epsilon for cell in runs})
    for epsilon in epsilons:
        group = [run for cell, found in runs.items() if cell.recipe.epsilon == epsilon for run in found]
        gaps = [gap_of(run) for run in group]
        if len(group) < 5:
            continue
        signals = {
            "FOSC": [run.audit.probe["fosc"] for run in group],
            "FOSC / (eps L1)": [run.audit.probe["fosc_relative"] for run in group],
            "the same, within [0, 1]": [run.audit.probe["fosc_within"] for run in group],
            "SGCS": [run.audit.probe["sgcs"] for run in group],
            "PGD with restarts minus black box": [run.audit.gap(MASKING).mean for run in group],
        }
        for name, values in signals.items():
            rows.append([f"{epsilon:.3g}", name, f"{fmean(values):.2f}", *_correlation(values, gaps)])
    if not rows:
        return ""
    head = ["epsilon", "signal", "mean", "r with the gap", "95% interval", "runs"]
    return f"### Do the signals tell?\n\nOver all runs at one epsilon.\n\n{_table(head, rows)}\n"


def _correlation(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """Pearson's r, Fisher's interval, number of pairs."""
    n = len(a)
    if n < 5 or stdev(a) == 0 or stdev(b) == 0:
        return ["–", "–", str(n)]
    found = pearsonr(a, b)
    low, high = found.confidence_interval()
    return [f"{found.statistic:+.2f}", f"[{low:+.2f}, {high:+.2f}]", str(n)]


def _pictures(images: str) -> str:
    return (
        f"![The gap of every run, by cell]({images}/robustness-gaps.png)\n\n"
        f"![FOSC, SGCS and the gap through training]({images}/robustness-curves.png)\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _plus_minus(gap: Gap) -> str:
    return f"{100 * gap.mean:.1f} ± {50 * (gap.high - gap.low):.1f}" if gap.n > 1 else f"{100 * gap.mean:.1f}"


def _interval(gap: Gap | None) -> str:
    return str(gap) if gap else "–"


def _spread(values: Sequence[float]) -> str:
    return f"{100 * stdev(values):.1f}" if len(values) > 1 else "–"

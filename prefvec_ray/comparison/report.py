"""A comparison as files: `comparison.json` with all figures, `comparison.md` with the tables, `comparison.png`."""

from functools import partial
from pathlib import Path

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.comparison.figures import ERRORS, CellFigures, Comparison, MethodFigures
from prefvec_ray.reports import plots
from prefvec_ray.reports.report import cell, table


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write the three files into `folder`. They can be written again at any time."""
    write_whole(folder / "comparison.json", comparison.model_dump_json(indent=1))
    write_whole(folder / "comparison.md", markdown(comparison))
    best = {m.method: (m.title, m.difference, m.error) for m in comparison.methods}
    fronts = {
        (c.run, c.seed, c.method): [means for means, best in zip(c.means, c.best, strict=True) if best]
        for c in comparison.cells
    }
    bases = {(c.run, c.seed): c.base for c in comparison.cells}
    plots.save(partial(plots.comparison_fronts, best, fronts, bases, comparison.objectives), folder, "comparison")


def markdown(comparison: Comparison) -> str:
    """How it was measured in a paragraph, the methods in one table, every seed in another."""
    first, places = comparison.methods[0], sorted({(c.run, c.seed) for c in comparison.cells})
    limits = "".join(f", limit of {name} {limit:g}" for name, limit in comparison.limits.items())
    lines = [
        f"Objectives: {', '.join(comparison.objectives)}{limits}. Each method was searched over {comparison.settings} "
        f"settings ({comparison.answers} answers) on each of {len(places)} (job, DPO seed). What it chose was measured "
        f"again on {comparison.report_prompts} report prompts, {comparison.report_samples_per_prompt} answers each. "
        f"The hypervolume is above the base there. Differences are to {first.method!r}, paired by prompt, base and DPO "
        f"seed; ± is both errors together, over the prompts and over the seeds. *Better* and *worse* are beyond "
        f"{ERRORS:g} errors.",
        "",
        table(
            ["method", "DPO runs", "DPO steps", "hypervolume", "difference", "seeds above", "verdict"],
            [_row(m, first, len(places)) for m in comparison.methods],
        ),
        "",
        "Each seed by itself, ± over the report prompts:",
        "",
        table(
            ["method", *(f"{cell(run)}, seed {seed}" for run, seed in places)],
            [[cell(m.method), *(_volume(comparison, m, *place) for place in places)] for m in comparison.methods],
        ),
        "",
    ]
    return "\n".join(lines)


def _row(m: MethodFigures, first: MethodFigures, places: int) -> list[str]:
    same = m is first
    return [
        f"`{m.method}`: {cell(m.title)}",
        f"{m.runs:g}",
        f"{m.steps:g}",
        f"{m.hypervolume:.4f}",
        "" if same else f"{m.difference:+.4f} ± {m.error:.4f}",
        "" if same else f"{m.wins} of {places}",
        "" if same else m.verdict,
    ]


def _volume(comparison: Comparison, m: MethodFigures, run: str, seed: int) -> str:
    found: CellFigures = next(c for c in comparison.cells if (c.run, c.seed, c.method) == (run, seed, m.method))
    return f"{found.hypervolume:.4f} ± {found.stderr:.4f}"

"""The report of a run: `report.md` with its plots, and one self-contained `report.html` that a phone can
read."""

import base64
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import markdown

from prefvec_ray.evaluation import plots
from prefvec_ray.evaluation.evaluate import Evaluation, compare
from prefvec_ray.evaluation.results import ReportData, SearchSummary

MAX_PAIRS = 3
"""Pairs of preferences that get heat maps of their own; six preferences would have fifteen."""


def write_report(folder: str | Path, data: ReportData) -> None:
    """Write `report.md`, `report.html` and `plots/*.{svg,png}` into `folder`; earlier ones are replaced.

    Takes plain data and seconds: a finished run can be drawn again at any time.
    """
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    drawn = _draw(folder / "plots", data)
    text = _environment().get_template("report.md.j2").render(**_facts(data), drawn=drawn)
    (folder / "report.md").write_text(text, encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    for image in sorted((folder / "plots").glob("*.svg")):
        encoded = base64.b64encode(image.read_bytes()).decode()
        body = body.replace(f'src="plots/{image.stem}.png"', f'src="data:image/svg+xml;base64,{encoded}"')
    body = body.replace("<strong>NO</strong>", '<strong class="no">NO</strong>')
    page = _environment().get_template("report.html.j2").render(title=html.escape(data.title), body=body)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _draw(folder: Path, data: ReportData) -> list[str]:
    """Draw what the data allows; the names of the pictures."""
    pairs = list(itertools.combinations(data.objectives, 2))[:MAX_PAIRS]
    pictures = {"control": partial(plots.control, data.seeds, data.objectives, data.metrics)}
    if pairs:
        axes = {p: data.objectives[p] for p in pairs[0]}
        pictures["tradeoff"] = partial(plots.tradeoff, data.seeds, axes, data.metrics)
    for pair in pairs:
        draw = partial(plots.heatmaps, data.seeds, pair, data.metrics, show=list(data.metrics))
        pictures[f"heatmaps-{'-'.join(pair)}"] = draw
    if data.curves:
        pictures["training"] = partial(plots.training, data.curves)
    if data.search and len(data.search.objectives) > 1:
        pictures["front"] = partial(plots.front, data.search, data.metrics)
    return [plots.save(draw, folder, name) for name, draw in pictures.items()]


def _facts(data: ReportData) -> dict[str, Any]:
    """What the template needs: the data, and every table as Markdown."""
    claims = data.claims()
    settings = {answer.setting: answer.coefficients for answer in data.served}
    answers: dict[str, dict[str, str]] = {}
    for answer in data.served:
        answers.setdefault(answer.prompt, {})[answer.setting] = answer.answer
    arrows = {"maximize": " ↑", "minimize": " ↓", None: ""}
    heads = [cell(name) + arrows[metric.direction] for name, metric in data.metrics.items()]
    return {
        "data": data,
        "point": point,
        "cell": cell,
        "claims": len(claims),
        "held": sum(claim.holds for _, claim in claims),
        "together": f"vectors ({', '.join('1' for _ in data.objectives)})",
        "prompts": len(next(iter(data.seeds[0].row("base").per_prompt.values()))),
        "served": table(
            ["", *(f"{cell(name)} ({point(coefficients)})" for name, coefficients in settings.items())],
            [
                [f"**{cell(prompt)}**", *(cell(given.get(name, "–")) for name in settings)]
                for prompt, given in answers.items()
            ],
        ),
        "claim_table": table(
            ["seed", "claim", "holds", "evidence"],
            [
                [str(seed), cell(claim.text), "yes" if claim.holds else "**NO**", cell(claim.evidence)]
                for seed, claim in claims
            ],
        ),
        "setting_tables": {
            results.seed: table(
                ["setting", *heads],
                [[cell(row.setting.name), *_numbers(row.evaluation, data)] for row in results.table],
            )
            for results in data.seeds
        },
        "front": table(
            ["coefficients", *heads],
            [[point(trial.coefficients), *_numbers(trial, data)] for trial in data.search.front],
        )
        if data.search
        else "",
        "confirmation": _confirmation(data.search) if data.search else "",
        "stages": table(
            ["stage", "seconds"],
            [
                *([cell(name), f"{seconds:.1f}"] for name, seconds in data.stages.items()),
                ["**all**", f"**{sum(data.stages.values()):.1f}**"],
            ],
        ),
        "machine": table(
            ["", ""], [[cell(name), cell(value)] for name, value in (data.machine | data.versions).items()]
        ),
        "config": json.dumps(data.config, indent=2, ensure_ascii=False, default=str),
    }


def _numbers(evaluation: Evaluation, data: ReportData) -> list[str]:
    return [str(evaluation.metrics.get(name) or "–") for name in data.metrics]


def _confirmation(search: SearchSummary) -> str:
    if search.confirmed is None:
        return ""
    base, chosen = search.confirmed
    rows = [
        [cell(name), *(str(value or "–") for value in (base.metrics[name], chosen.metrics[name], difference))]
        for name, difference in compare(chosen, base).items()
    ]
    return table(["", "base", "recommended", "difference, paired"], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def point(coefficients: Mapping[str, float]) -> str:
    """A setting as words: `helpful 0.7, harmless 1`."""
    return ", ".join(f"{cell(name)} {round(value, 2):g}" for name, value in coefficients.items()) or "all 0"


def cell(value: Any) -> str:
    """Text that comes from outside, made safe for a table cell in Markdown and in HTML."""
    text = html.escape(str(value), quote=False)
    for special in "*`[]|\\":
        text = text.replace(special, f"&#{ord(special)};")
    return "<br>".join(text.splitlines())


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("prefvec_ray.evaluation"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown: what comes from outside goes through `cell`
    )

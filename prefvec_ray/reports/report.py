"""The report of a run: `report.md` with its plots, and one self-contained `report.html` that a phone can
read."""

import base64
import hashlib
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import markdown
from markupsafe import Markup

from prefvec_ray.artifacts.evaluation import Effect, Evaluation, ReportData, SearchSummary
from prefvec_ray.evaluation.control import ERRORS, check_claims
from prefvec_ray.evaluation.evaluate import compare
from prefvec_ray.evaluation.settings import together_name
from prefvec_ray.reports import page, plots

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
    (folder / "report.html").write_text(_page(data, body), encoding="utf-8")


def _page(data: ReportData, body: str) -> str:
    """The self-contained page: its one script is allowed by digest, so that nothing else in it can run."""
    files, drawn = _environment(), page.page_data(data)
    script = files.get_template("page.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            title=data.title,
            style=Markup(files.get_template("page.css.j2").render()),
            script=Markup(script),
            script_digest=f"'sha256-{digest}'",
            warnings=data.warnings(),
            summary=page.summary(data),
            presets=page.preset_cards(data),
            page=drawn,
            page_json=Markup(page.as_script(drawn)),
            coupling=_coupling(page.effects(data), data),
            cards=data.cards,
            body=Markup(body),
        )
    )


def _coupling(effects: Sequence[Effect], data: ReportData) -> dict[str, Any] | None:
    """The coupling matrix as the page shows it: a row a coefficient, goals first."""
    if not effects:
        return None
    by_place = {(effect.preference, effect.metric): effect.slope for effect in effects}
    goals = [*data.objectives.values(), *(data.search.objectives if data.search else [])]
    metrics = list(dict.fromkeys([*goals, *(effect.metric for effect in effects)]))
    rows = []
    for preference in dict.fromkeys(effect.preference for effect in effects):
        cells = []
        for metric in metrics:
            slope = by_place.get((preference, metric))
            gain = 0.0 if slope is None else data.metrics[metric].gain(slope.mean, 0.0)
            clear = slope is not None and abs(gain) > ERRORS * (slope.stderr or 0.0)
            text = "–" if slope is None else f"{slope.mean:+.2f}" + (f" ±{slope.stderr:.2f}" if slope.stderr else "")
            cells.append({"text": text.replace("-", "−"), "tone": ("good" if gain > 0 else "bad") if clear else "same"})
        rows.append({"preference": preference, "cells": cells})
    return {"metrics": metrics, "rows": rows}


def _draw(folder: Path, data: ReportData) -> list[str]:
    """Draw what the data allows; the names of the pictures."""
    pairs = list(itertools.combinations(data.objectives, 2))[:MAX_PAIRS]
    gridded = [results for results in data.seeds if results.grid]
    pictures = {}
    if gridded and data.objectives:
        pictures["control"] = partial(plots.control, gridded, data.objectives, data.metrics)
    if pairs and data.seeds:
        axes = {p: data.objectives[p] for p in pairs[0]}
        pictures["tradeoff"] = partial(plots.tradeoff, data.seeds, axes, data.metrics)
    for pair in pairs if gridded else ():
        draw = partial(plots.heatmaps, gridded, pair, data.metrics, show=list(data.metrics))
        pictures[f"heatmaps-{'-'.join(pair)}"] = draw
    for results in data.seeds:
        if not results.grid:
            pictures[f"settings-{results.seed}"] = partial(plots.settings, results, data.metrics)
    if data.curves:
        pictures["training"] = partial(plots.training, data.curves)
    if data.search and len(data.search.objectives) > 1:
        pictures["front"] = partial(plots.front, data.search, data.metrics)
    return [plots.save(draw, folder, name) for name, draw in pictures.items()]


def _facts(data: ReportData) -> dict[str, Any]:
    """What the template needs: the data, and every table as Markdown."""
    claims = check_claims(data)
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
        "headlines": _headlines(data),
        "prompts": _prompts(data),
        "warnings": [cell(line) for line in data.warnings()],
        "presets": _presets(data.search) if data.search else "",
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
        "controls": any(row.setting.kind == "control" for results in data.seeds for row in results.table),
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


def _headlines(data: ReportData) -> list[str]:
    """What all coefficients at 1 do to each objective, a line a seed, where that was measured."""
    together, found = together_name(len(data.objectives)), []
    for results in data.seeds:
        rows = {row.setting.name: row.evaluation for row in results.table}
        if {"base", together} <= set(rows) and data.objectives:
            parts = [
                f"{cell(metric)} {rows['base'].mean(metric):.3f} → {rows[together].mean(metric):.3f}"
                for metric in data.objectives.values()
            ]
            found.append(f"DPO seed {results.seed}, all coefficients from 0 to 1: {', '.join(parts)}.")
    return found


def _prompts(data: ReportData) -> int:
    """How many prompts the numbers that count were measured on."""
    if data.seeds:
        measured = data.seeds[0].table[0].evaluation
    elif data.search:
        measured = data.search.confirmed[0] if data.search.confirmed else data.search.base
    else:
        return 0
    return max((value.n for value in measured.metrics.values() if value is not None), default=0)


def _presets(search: SearchSummary) -> str:
    rows = [
        [
            f"**{cell(preset.name)}**" + (f" (`{cell(preset.published)}`)" if preset.published else ""),
            point(preset.coefficients),
            cell(preset.rule),
            cell(preset.verdict or "not measured on report prompts"),
            cell(preset.evidence or preset.reason),
        ]
        for preset in search.presets
    ]
    return table(["preset", "coefficients", "rule", "on the report prompts", "evidence"], rows) if rows else ""


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


def _environment(*, autoescape: bool = False) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("prefvec_ray.reports"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,  # off for Markdown, where what comes from outside goes through `cell`
    )

"""What `report.html` shows a reader who does not program: a summary in plain words, and the points to click.

All of it is plain data. The page's own script (`templates/page.js.j2`) draws it, and writes every text that came from
outside as text, never as markup.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prefvec_ray.artifacts.evaluation import Effect, Evaluation, Metric, Preset, ReportData, SearchSummary, SeedResults
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import Estimate, estimate
from prefvec_ray.evaluation.control import check_claims, coupling, lines
from prefvec_ray.evaluation.evaluate import compare, compare_metric
from prefvec_ray.evaluation.settings import is_base, together_name

SAMPLED = 200
"""Points beyond the front that keep their sample answers: a search of thousands must not make a page of gigabytes."""

VERDICTS = {
    "confirmed": "confirmed on prompts that the search never saw",
    "unclear": "neither confirmed nor refuted on prompts that the search never saw",
    "refuted": "refuted on prompts that the search never saw",
}


def page_data(data: ReportData) -> dict[str, Any]:
    """Everything that the page draws, JSON-able: metrics, views with their points, control curves, search history."""
    views = [_search_view(data.search, data.metrics)] if data.search else []
    views += [_comparison_view(results, data) for results in data.seeds]
    return {
        "metrics": {name: metric.model_dump() for name, metric in data.metrics.items()},
        "views": [view for view in views if view["points"]],
        "control": control_curves(data),
        "history": _history(data.search) if data.search else None,
    }


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a <script> element, whatever it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def summary(data: ReportData) -> list[str]:
    """The report in a few plain sentences, as text."""
    found = []
    search = data.search
    chosen = _recommended(search) if search else None
    if search and chosen is None:
        found.append(
            f"{len(search.trials)} settings were tried, and none of them keeps the limits that were set: "
            "there is nothing to recommend."
        )
    if search and chosen is not None:
        if is_base(chosen.coefficients):
            found.append(
                "We recommend the base model as it is: no setting that was tried is better in everything that was "
                "searched for, beyond chance."
            )
        else:
            found.append(f"We recommend {words(chosen.coefficients)}. {_outcome(chosen, search, data.metrics)}")
        found.append(
            f"It was chosen from {len(search.trials) + search.dropped} settings; {len(search.front)} of them are best "
            "choices: no other setting is clearly better. Each is a point below: click one to see its dials, numbers "
            "and what the model then says."
        )
    for results in data.seeds[:1]:
        together = _row(results, together_name(len(data.objectives)))
        base = _row(results, "base")
        if together is not None and base is not None and chosen is None:
            changes = _changes(together, base, list(data.objectives.values()), data.metrics)
            found.append(f"With every dial at 1, {changes}, compared with the base model.")
    costs = _costs(effects(data), data)
    if costs:
        found.append(costs)
    claims = check_claims(data)
    if claims:
        held = sum(claim.holds for _, claim in claims)
        found.append(
            f"Of {len(claims)} claims about this run that were checked by measurement, {held} hold"
            + ("." if held == len(claims) else f" and {len(claims) - held} do not; all are listed below.")
        )
    return found


def words(coefficients: Mapping[str, float]) -> str:
    """`helpful at 0.7 and harmless at 1`."""
    parts = [f"{name} at {round(value, 2):g}" for name, value in coefficients.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "the base model as it is"


def preset_cards(data: ReportData) -> list[dict[str, Any]]:
    """The presets of a search, as the page shows them on top."""
    if not data.search:
        return []
    number = _numbers_of(data.search.trials)
    return [
        {
            "name": preset.name,
            "point": number.get(_key(preset.searched), 0),
            "setting": words(preset.coefficients),
            "rule": preset.rule,
            "outcome": _outcome(preset, data.search, data.metrics),
            "verdict": preset.verdict or "",
            "verdict_words": VERDICTS.get(preset.verdict or "", "measured on the search prompts only"),
            "published": preset.published,
        }
        for preset in data.search.presets
    ]


def effects(data: ReportData) -> list[Effect]:
    """The coupling matrix on the best data that there is: the first seed's grid, else the search's control lines, else
    what the search tried."""
    metrics = [name for name, metric in data.metrics.items() if metric.direction is not None]
    for settings in (
        data.seeds[0].grid if data.seeds else [],
        data.search.control if data.search else [],
        data.search.trials if data.search else [],
    ):
        if len(settings) > 2:
            return coupling(settings, metrics)
    return []


def control_curves(data: ReportData) -> list[dict[str, Any]]:
    """For each coefficient the course of every metric along it, with standard errors over prompts; the mean over the
    other coefficients where they were varied too."""
    settings = data.seeds[0].grid if data.seeds and data.seeds[0].grid else data.search.control if data.search else []
    found = []
    for preference in dict.fromkeys(name for e in settings for name in e.coefficients):
        try:
            along = lines(settings, preference)
        except InputError:
            continue
        longest = max(map(len, along))
        full = [line for line in along if len(line) == longest]
        curves = {}
        for metric in data.metrics:
            points = [_pooled([line[i] for line in full], metric) for i in range(longest)]
            if all(point is not None for point in points):
                curves[metric] = [[point.mean, point.stderr or 0.0] for point in points if point is not None]
        etas = [e.coefficients.get(preference, 0.0) for e in full[0]]
        found.append({"preference": preference, "etas": etas, "curves": curves, "lines": len(full)})
    return found


def _pooled(evaluations: Sequence[Evaluation], metric: str) -> Estimate | None:
    """The metric averaged over the settings prompt by prompt, then estimated over prompts."""
    columns = zip(*(e.per_prompt[metric] for e in evaluations), strict=True)
    known = [[value for value in column if value is not None] for column in columns]
    return estimate([statistics.fmean(values) if values else None for values in known])


def _search_view(search: SearchSummary, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    chances: list[float | None] = [*search.front_probability] or [None] * len(search.front)
    front = {_key(e): chance for e, chance in zip(search.front, chances, strict=True)}
    named: dict[str, list[Preset]] = {}
    for preset in search.presets:
        named.setdefault(_key(preset.searched), []).append(preset)
    report_base = search.confirmed[0] if search.confirmed else None
    points = []
    for number, e in enumerate(search.trials):
        key = _key(e)
        presets = named.get(key, [])
        broken = search.broken(e, metrics)
        is_base = key == _key(search.base)
        places = {"base": is_base, "preset": bool(presets), "front": key in front, "limit": bool(broken), "tried": True}
        kind = next(name for name, here in places.items() if here)
        name = "base model" if is_base else " · ".join(p.name for p in presets) or f"setting {number + 1}"
        point = _point(e, name, kind, search.base)
        if key in front:
            chance = front[key]
            point["front"] = "one of the best choices" + ("" if chance is None else f" (sure to {chance:.0%})")
        if kind not in ("base", "preset", "front") and number >= SAMPLED:
            point["samples"] = []
        if broken:
            point["notes"] = [f"breaks the limit on {', '.join(broken)}"]
        if presets:
            point["notes"] = [f"{p.name}: {p.reason}" for p in presets]
            reported = presets[0].reported
            if reported is not None and report_base is not None:
                point["reported"] = _values(reported, report_base)
                point["verdict"] = VERDICTS.get(presets[0].verdict or "", "")
        points.append(point)
    x, y = _axes(search.objectives, metrics)
    return {
        "name": "What the search tried",
        "note": "Measured on the search prompts. What is chosen on these looks a little better here than it is; "
        "presets were measured again on prompts that the search never saw."
        + (
            " With more than two goals, a best choice may look beaten in the two shown."
            if len(search.objectives) > 2
            else ""
        ),
        "points": points,
        "start": _numbers_of(search.trials).get(_key(search.presets[0].searched)) if search.presets else None,
        "x": x,
        "y": y,
    }


def _history(search: SearchSummary) -> dict[str, Any]:
    """The hypervolume against what was paid for it: answers where they were counted, else settings."""
    values = search.hypervolume_history
    counted = len(search.spent) == len(values) > 0
    return {
        "x": search.spent if counted else list(range(1, len(values) + 1)),
        "label": "answers generated" if counted else "settings tried",
        "values": values,
        "notes": search.notes,
    }


def _comparison_view(results: SeedResults, data: ReportData) -> dict[str, Any]:
    """Every setting of the comparison table, and the grid's, against the table's base."""
    base = _row(results, "base") or results.table[0].evaluation
    points = [_point(row.evaluation, row.setting.name, row.setting.kind, base) for row in results.table]
    known = {_key(row.evaluation) for row in results.table}
    for e in results.grid:
        if _key(e) not in known:
            points.append(_point(e, f"vectors ({', '.join(f'{v:g}' for v in e.coefficients.values())})", "grid", base))
    names = list(data.objectives.values()) or [name for name, metric in data.metrics.items() if metric.direction]
    x, y = _axes(names, data.metrics)
    return {
        "name": f"Compared with other methods (training seed {results.seed})",
        "note": "All measured on the same prompts with the same random numbers; changes are paired by prompt.",
        "points": points,
        "x": x,
        "y": y,
    }


def _axes(objectives: Sequence[str], metrics: Mapping[str, Metric]) -> tuple[str, str]:
    others = [name for name, metric in metrics.items() if metric.direction is not None and name not in objectives]
    names = [*objectives, *others, *metrics]
    return names[0], names[1 if len(names) > 1 else 0]


def _point(e: Evaluation, name: str, kind: str, base: Evaluation) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "coefficients": e.coefficients,
        "values": _values(e, base),
        "samples": [[sample.prompt, sample.answer] for sample in e.samples],
    }


def _values(e: Evaluation, base: Evaluation) -> dict[str, Any]:
    """Metric -> [mean, error, prompts, base's mean, paired difference, its error]."""
    differences = compare(e, base) if e.prompts_digest == base.prompts_digest else {}
    found = {}
    for name, value in e.metrics.items():
        if value is not None:
            before, difference = base.metrics.get(name), differences.get(name)
            found[name] = [
                value.mean,
                value.stderr,
                value.n,
                before.mean if before else None,
                difference.mean if difference else None,
                difference.stderr if difference else None,
            ]
    return found


def _recommended(search: SearchSummary) -> Preset | None:
    """The recommended setting as a preset, also where an older run recorded none."""
    for preset in search.presets:
        if preset.coefficients == search.recommended:
            return preset
    chosen = next((e for e in search.front if e.coefficients == search.recommended), None)
    if chosen is None:
        return None
    return Preset(
        name="recommended",
        rule="",
        raises=[],
        reason=search.reason,
        searched=chosen,
        reported=search.confirmed[1] if search.confirmed else None,
        published=search.preset,
    )


def _outcome(preset: Preset, search: SearchSummary, metrics: Mapping[str, Metric]) -> str:
    if preset.reported is not None and search.confirmed:
        base = search.confirmed[0]
        prompts = max(value.n for value in preset.reported.metrics.values() if value is not None)
        where = f"On {prompts} prompts that the search never saw, "
        return where + _changes(preset.reported, base, search.objectives, metrics) + ", compared with the base model."
    changes = _changes(preset.searched, search.base, search.objectives, metrics)
    return f"On the prompts that it was chosen on, {changes}, compared with the base model."


def _changes(e: Evaluation, base: Evaluation, names: Sequence[str], metrics: Mapping[str, Metric]) -> str:
    """`helpful improves from 0.34 to 0.49 (by 0.15 ± 0.01) and harmless stays about the same (0.57, then 0.58)`."""
    parts = []
    for name in dict.fromkeys(names):
        difference = compare_metric(e, base, name)
        if difference is None:
            continue
        gain, error = metrics[name].gain(difference.mean, 0.0), difference.stderr or 0.0
        span = f"{base.mean(name):.2f} to {e.mean(name):.2f}"
        if abs(gain) <= 2 * error or gain == 0:
            parts.append(f"{name} stays about the same ({span})")
        else:
            verb = "improves" if gain > 0 else "gets worse"
            parts.append(f"{name} {verb} from {span} (by {abs(difference.mean):.2f} ± {error:.2f})")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "nothing was measured"


def _costs(found: Sequence[Effect], data: ReportData) -> str:
    """How raising one coefficient harms the goals of the others, where the harm is beyond noise."""
    parts = []
    for effect in found:
        own = data.objectives.get(effect.preference)
        gain = data.metrics[effect.metric].gain(effect.slope.mean, 0.0)
        others = [metric for preference, metric in data.objectives.items() if preference != effect.preference]
        if own != effect.metric and effect.metric in others and gain < -2 * (effect.slope.stderr or 0.0):
            parts.append(
                f"turning {effect.preference} up by 1 costs {abs(effect.slope.mean):.2f} "
                f"(± {effect.slope.stderr or 0.0:.2f}) of {effect.metric}"
            )
    return f"The dials are not independent: on average {'; '.join(parts)}." if parts else ""


def _numbers_of(trials: Sequence[Evaluation]) -> dict[str, int]:
    return {_key(e): number for number, e in reversed(list(enumerate(trials)))}


def _key(e: Evaluation) -> str:
    """Settings that are equal whether zeros are spelled out or not."""
    return json.dumps({name: value for name, value in sorted(e.coefficients.items()) if value})


def _row(results: SeedResults, name: str) -> Evaluation | None:
    return next((row.evaluation for row in results.table if row.setting.name == name), None)

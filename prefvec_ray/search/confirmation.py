"""What a search found, measured again on unseen prompts: the base, the presets, and each coefficient alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefvec_ray.artifacts.evaluation import Evaluation, Preset, ReportData, SearchSummary
from prefvec_ray.evaluation.prompts import check_disjoint
from prefvec_ray.scorers.base import safety_cards, scorer_digest
from prefvec_ray.search.measure import measure
from prefvec_ray.search.options import Bounds, SearchConfig
from prefvec_ray.search.presets import choose, confirm, figures, publish, search_evidence
from prefvec_ray.search.result import SearchResult
from prefvec_ray.search.trial import Task


def report_task(task: Task, prompts: Sequence[Any], samples_per_prompt: int | None = None) -> Task:
    """The task of a search on report prompts.

    Raises:
        InputError: a report prompt is a search prompt too.
    """
    check_disjoint(task.prompts, prompts)
    wanted = samples_per_prompt or task.sampling.samples_per_prompt
    return replace(task, prompts=prompts, sampling=task.sampling.model_copy(update={"samples_per_prompt": wanted}))


def report_search(
    result: SearchResult,
    task: Task,
    rules: Mapping[str, str],
    config: SearchConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SearchSummary:
    """Measure again on `task`, a `report_task`: the base, the recommendation, the preset of each rule, and
    `config.control_steps` settings along each coefficient within its range."""
    base = dict.fromkeys(task.vectors, 0.0)
    presets = choose(result, rules)
    chosen = result.recommended
    lines = [base, *along(config.bounds(task.vectors), config.control_steps)] if config.control_steps else []
    wanted = [base, *(preset.coefficients for preset in presets), *lines]
    wanted += [chosen.coefficients] if chosen else []
    distinct = {_key(point): point for point in wanted}
    found = measure(task, list(distinct.values()), config, progress=progress)
    by_key = dict(zip(distinct, found, strict=True))

    def at(point: Mapping[str, float]) -> Evaluation:
        return by_key[_key(point)]

    confirmed = [confirm(preset, at(base), at(preset.coefficients), result.goal) for preset in presets]
    summary = result.summary(confirmed=(at(base), at(chosen.coefficients)) if chosen else None)
    control_points = list({_key(point): at(point) for point in lines}.values())
    return summary.model_copy(update={"presets": confirmed, "control": control_points})


def along(bounds: Bounds, steps: int) -> list[dict[str, float]]:
    """`steps` values of each coefficient from the low to the high end of its range, the others 0."""
    found = []
    for name, (low, high) in bounds.items():
        for i in range(steps):
            value = low + (high - low) * i / max(1, steps - 1)
            found.append({**dict.fromkeys(bounds, 0.0), name: value})
    return found


def publish_presets(
    summary: SearchSummary, result: SearchResult, task: Task, registry: Any, refs: Mapping[str, str]
) -> SearchSummary:
    """Publish every preset that the report prompts do not refute; `refs` are the vectors' pinned references. The
    summary comes back with the names of what was published; one that was refuted keeps None."""
    scorer = task.load_scorer()
    evidence = search_evidence(result, scorer=scorer_digest(scorer), cards=safety_cards(scorer))
    if summary.confirmed:  # what the presets' figures are to be compared with
        evidence["base"] = figures(summary.confirmed[0])
    presets: list[Preset] = []
    for preset in summary.presets:
        version = publish(registry, preset, refs, evidence)
        presets.append(preset.model_copy(update={"published": version.ref if version else None}))
    recommended = next((p.published for p in presets if p.coefficients == summary.recommended and p.published), None)
    return summary.model_copy(update={"presets": presets, "preset": recommended})


def search_report(summary: SearchSummary, task: Task, title: str, **extra: Any) -> ReportData:
    """The report of a search by itself, for `write_report`."""
    metrics = task.metrics
    return ReportData(
        title=title,
        objectives={name: name for name in task.vectors if name in summary.objectives},
        metrics=metrics,
        cards=safety_cards(task.load_scorer()),
        search=summary,
        **extra,
    )


def _key(point: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, value) for name, value in point.items() if value))

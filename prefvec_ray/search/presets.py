"""Named settings from a search, by stated rules, confirmed on prompts that the search never saw, and published.

presets = [confirm(preset, base, measured, goal) for preset in choose(result, {"balanced": "compromise"})]
publish(registry, preset, {"helpful": "helpful@1"}, evidence(...))
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefvec_ray.artifacts.evaluation import Evaluation, Preset, ScorerCard
from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import is_base
from prefvec_ray.evaluation.control import ERRORS
from prefvec_ray.evaluation.evaluate import compare_metric
from prefvec_ray.search.result import Goal, SearchResult

if TYPE_CHECKING:
    from prefvec_ray.registry.records import PresetVersion

COMPROMISE = "compromise"


def default_rules(goal: Goal) -> dict[str, str]:
    """Name -> rule: `balanced` is the compromise; `cautious` the best of what decides harmlessness, and each other
    objective gives its own name to the best of it."""
    rules = {"balanced": COMPROMISE}
    for objective in goal.objectives if len(goal.objectives) > 1 else ():
        name = "cautious" if goal.metrics[objective].safety else objective
        rules[name if name not in rules else f"{name}-{objective}"] = objective
    return rules


def check_rules(rules: Mapping[str, str], goal: Goal) -> None:
    """InputError where a rule is neither `compromise` nor an objective."""
    for name, rule in rules.items():
        if rule != COMPROMISE and rule not in goal.objectives:
            known = ", ".join((COMPROMISE, *goal.objectives))
            raise InputError(f"preset {name!r}: unknown rule {rule!r}; the rules of this search are: {known}")


def choose(result: SearchResult, rules: Mapping[str, str]) -> list[Preset]:
    """The setting that each rule picks on the search prompts.

    `compromise` is the search's recommendation. An objective's own rule is its best mean among the settings that keep
    the limits and in which every other objective has at least the base's mean. A rule that no setting but the base
    meets gives no preset.
    """
    check_rules(rules, result.goal)
    found = []
    for name, rule in rules.items():
        preset = _compromise(name, result) if rule == COMPROMISE else _best(name, rule, result)
        if preset is not None:
            found.append(preset)
    return found


def confirm(preset: Preset, base: Evaluation, measured: Evaluation, goal: Goal) -> Preset:
    """`preset` with its verdict: `measured` is its setting on the report prompts, `base` the base there.

    Refuted: by more than two paired standard errors, an objective that it was chosen to keep or to raise is below the
    base, or a limit is broken. A limit beside the base is judged beside the base on the report prompts. Confirmed: not
    refuted, it raised some objective on the search prompts and every such one is above the base by more than two, and
    the limits were measured. Unclear: neither.
    """
    refuted, confirmed, words = [], bool(preset.raises), []
    for name in goal.objectives:
        difference = compare_metric(measured, base, name)
        if difference is None:
            confirmed &= name not in preset.raises
            words.append(f"{name} was defined on none of the report prompts")
            continue
        gain, error = goal.metrics[name].gain(difference.mean, 0.0), difference.stderr or 0.0
        words.append(f"{name} {base.mean(name):.3f} → {measured.mean(name):.3f} ({difference.mean:+.3f} ± {error:.3f})")
        if name in (*preset.raises, *preset.keeps) and gain < -ERRORS * error:
            refuted.append(f"{name} is worse than the base's")
        if name in preset.raises:
            confirmed &= gain > ERRORS * error
    for name, limit in goal.limits.items():
        beside = goal.beside_base.get(name)
        value = measured.metrics.get(name) if beside is None else compare_metric(measured, base, name)
        if value is None:
            confirmed = False
            words.append(f"{name} was defined on none of the report prompts")
            continue
        if goal.metrics[name].gain(value.mean, limit if beside is None else beside) < -ERRORS * (value.stderr or 0.0):
            refuted.append(f"{name} {measured.metrics[name]} breaks its limit {goal.limit_words(name)}")
    return preset.model_copy(
        update={
            "reported": measured,
            "verdict": "refuted" if refuted else "confirmed" if confirmed else "unclear",
            "evidence": "; ".join([*refuted, *words]),
        }
    )


def publish(
    registry: Any, preset: Preset, vectors: Mapping[str, str], evidence: Mapping[str, Any]
) -> "PresetVersion | None":
    """Publish a confirmed or unclear preset with its evidence; one that was refuted, or never measured on report
    prompts, is not published (None).

    `registry` is a store or its actor's client; `vectors` maps each name to its pinned reference; `evidence` goes in
    beside the metrics of the report prompts.
    """
    if preset.reported is None or preset.verdict in (None, "refuted"):
        return None
    stated = {
        "verdict": preset.verdict,
        "numbers": preset.evidence,
        "rule": preset.rule,
        "report_prompts": preset.reported.prompts_digest,
        "search_prompts": preset.searched.prompts_digest,
        **evidence,
    }
    return _publish(registry, preset, vectors, {**figures(preset.reported), "evidence": stated})


def publish_searched(
    registry: Any, result: SearchResult, name: str, vectors: Mapping[str, str]
) -> "PresetVersion | None":
    """Publish the recommendation as `name`, on the evidence of the search prompts alone.

    None where it is the base, which needs no name, or where there is none.
    """
    found = choose(result, {name: COMPROMISE})
    return _publish(registry, found[0], vectors, figures(found[0].searched)) if found else None


def _publish(registry: Any, preset: Preset, vectors: Mapping[str, str], metrics: Mapping[str, Any]) -> "PresetVersion":
    coefficients = {ref: preset.coefficients.get(name, 0.0) for name, ref in vectors.items()}
    return registry.publish_preset(preset.name, coefficients, metrics=metrics, reason=preset.reason)


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """What an evaluation measured, as a published preset keeps it."""
    return {name: value.model_dump() for name, value in evaluation.metrics.items() if value is not None}


def search_evidence(
    result: SearchResult, *, scorer: str | None, cards: Mapping[str, ScorerCard | None]
) -> dict[str, Any]:
    """The lineage of a search, for `publish`: what was searched, and with which scorer and cards."""
    return {
        "search": {
            "objectives": list(result.goal.objectives),
            "limits": dict(result.goal.limits),
            "settings": len(result.trials),
            "front": len(result.front),
            "answers": result.answers,
            "ended": result.stopped,
        },
        "scorer": scorer,
        "cards": {name: card.model_dump(exclude_unset=True) if card else None for name, card in cards.items()},
    }


def _compromise(name: str, result: SearchResult) -> Preset | None:
    chosen = result.recommended
    if chosen is None or is_base(chosen.coefficients):
        return None
    trial = next(e for e in result.front if e.coefficients == chosen.coefficients)
    rule = "of the settings on the front, the one that gives up least of what each objective could gain over the base"
    goal, base = result.goal, result.base
    raises = [q for q in goal.objectives if goal.metrics[q].gain(trial.mean(q), base.mean(q)) > 0]
    return Preset(name=name, rule=rule, raises=raises, reason=chosen.reason, searched=trial)


def _best(name: str, objective: str, result: SearchResult) -> Preset | None:
    goal, base = result.goal, result.base
    others = [other for other in goal.objectives if other != objective]
    allowed = [
        trial
        for trial in result.trials
        if goal.keeps_limits(trial)
        and all(goal.metrics[other].gain(trial.mean(other), base.mean(other)) >= 0 for other in others)
    ]
    metric = goal.metrics[objective]
    best = max(allowed, key=lambda trial: metric.gain(trial.mean(objective), 0.0), default=base)
    if metric.gain(best.mean(objective), base.mean(objective)) <= 0:
        return None
    kept = " and ".join(f"{other} at least as good as the base's" for other in others)
    rule = f"the best {objective}" + (f" with {kept}" if kept else "")
    numbers = "; ".join(f"{q} {base.mean(q):.3f} → {best.mean(q):.3f}" for q in (objective, *others))
    reason = f"{rule}, of {len(allowed)} settings that keep to this on the search prompts: {numbers}"
    return Preset(name=name, rule=rule, raises=[objective], keeps=others, reason=reason, searched=best)

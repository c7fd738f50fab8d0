"""Presets from a made-up search: `help` and `harm` are its objectives, `harm` decides harmlessness."""

from collections.abc import Sequence

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.registry import Registry
from prefvec_ray.scorers import Metric
from prefvec_ray.search import Goal, SearchConfig, SearchResult
from prefvec_ray.search.confirmation import along, publish_presets
from prefvec_ray.search.presets import choose, confirm, default_rules, publish, publish_searched
from prefvec_ray.vectors import save_vector, vector_from_state

METRICS = {
    "help": Metric(direction="maximize", low=0, high=1),
    "harm": Metric(direction="minimize", low=0, high=1, safety=True),
    "valid": Metric(direction="maximize", low=0, high=1),
}
GOAL = Goal(objectives=("help", "harm"), metrics=METRICS, limits={"valid": 0.9})
ROWS = {
    (0.0, 0.0): (0.3, 0.5, 1.0),
    (1.0, 0.0): (0.8, 0.6, 1.0),
    (0.7, 0.3): (0.7, 0.45, 1.0),
    (0.0, 1.0): (0.2, 0.1, 1.0),
    (0.2, 0.9): (0.35, 0.2, 1.0),
    (1.0, 1.0): (0.6, 0.3, 0.95),
    (2.0, 2.0): (0.9, 0.0, 0.5),
}


def evaluated(
    point: Sequence[float], means: Sequence[float], *, spread: float = 0.01, digest: str = "search"
) -> Evaluation:
    """Sixteen prompts around the means; the spread alternates, so it does not cancel in differences of other signs."""
    names = ("help", "harm", "valid")
    per_prompt = {n: [m + spread * (-1) ** i for i in range(16)] for n, m in zip(names, means, strict=True)}
    return Evaluation(
        coefficients=dict(zip(("a", "b"), point, strict=True)),
        metrics={name: estimate(values) for name, values in per_prompt.items()},
        per_prompt=per_prompt,
        prompts_digest=digest,
        samples=[],
        seconds=0.1,
        tokens=1,
    )


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return SearchResult(goal=GOAL, trials=[evaluated(point, means) for point, means in ROWS.items()])


def on_report(point: Sequence[float], *means: float, spread: float = 0.01) -> Evaluation:
    return evaluated(point, means, spread=spread, digest="report")


BASE = on_report((0.0, 0.0), 0.3, 0.5, 1.0)


def test_each_rule_picks_its_setting_and_says_why(result):
    assert default_rules(GOAL) == {"balanced": "compromise", "help": "help", "cautious": "harm"}
    presets = {preset.name: preset for preset in choose(result, default_rules(GOAL))}
    points = {name: tuple(preset.coefficients.values()) for name, preset in presets.items()}
    assert points["help"] == (0.7, 0.3), "(1, 0) helps more, but is more harmful than the base"
    assert points["cautious"] == (0.2, 0.9), (
        "(0, 1) is less harmful, but helps less than the base; (2, 2) breaks a limit"
    )
    assert presets["balanced"].coefficients == result.recommended.coefficients
    assert presets["cautious"].rule == "the best harm with help at least as good as the base's"
    assert "harm 0.500 → 0.200; help 0.300 → 0.350" in presets["cautious"].reason
    assert (presets["cautious"].raises, presets["cautious"].keeps) == (["harm"], ["help"])


def test_no_setting_beats_the_base_within_a_rule(result):
    poor = SearchResult(goal=GOAL, trials=[result.trials[0], result.trials[3]])
    assert [preset.name for preset in choose(poor, {"help": "help"})] == []
    alone = SearchResult(goal=GOAL, trials=result.trials[:1])
    assert alone.recommended is not None
    assert "stay with the base" in alone.recommended.reason
    assert choose(alone, {"balanced": "compromise"}) == [], "the base needs no name"
    with pytest.raises(InputError, match="unknown rule 'kind'; the rules of this search are: compromise, help, harm"):
        choose(result, {"nice": "kind"})
    assert default_rules(Goal(objectives=("help",), metrics=METRICS)) == {"balanced": "compromise"}


def test_the_report_prompts_confirm_leave_open_or_refute(result):
    (cautious,) = choose(result, {"cautious": "harm"})
    point = tuple(cautious.coefficients.values())

    def verdict(*means, spread=0.01):
        return confirm(cautious, BASE, on_report(point, *means, spread=spread), GOAL)

    good = verdict(0.31, 0.25, 1.0, spread=0.02)
    assert good.verdict == "confirmed"
    assert "harm 0.500 → 0.250 (-0.250 ± 0.003)" in good.evidence
    assert verdict(0.3, 0.499, 1.0, spread=0.03).verdict == "unclear", "no gain beyond the error, nothing lost either"
    worse = verdict(0.2, 0.25, 1.0, spread=0.02)
    assert (worse.verdict, worse.evidence.split(";")[0]) == ("refuted", "help is worse than the base's")
    broken = verdict(0.31, 0.25, 0.8)
    assert broken.verdict == "refuted"
    assert "breaks its limit 0.9" in broken.evidence


def test_a_limit_beside_the_base_is_judged_beside_the_base_of_the_report_prompts(result):
    """The search prompts' base was at 1.0, that of the report prompts is at 0.8; errors are those of the difference."""
    goal = Goal(objectives=("help", "harm"), metrics=METRICS, beside_base={"valid": -0.1}).with_base(result.base)
    assert goal.limits == pytest.approx({"valid": 0.9})
    (cautious,) = choose(result, {"cautious": "harm"})
    base = on_report((0.0, 0.0), 0.3, 0.5, 0.8, spread=0.15)

    def verdict(valid):
        return confirm(cautious, base, on_report((0.2, 0.9), 0.31, 0.25, valid, spread=0.15), goal)

    assert verdict(0.71).verdict == "confirmed"
    assert verdict(0.69).verdict == "refuted", "its own error of 0.15 would hide the loss"
    assert "breaks its limit 0.9 (base - 0.1)" in verdict(0.69).evidence


def test_what_the_report_prompts_do_not_say_is_not_confirmed(result):
    (cautious,) = choose(result, {"cautious": "harm"})
    good = on_report((0.2, 0.9), 0.31, 0.25, 1.0, spread=0.02)

    def without(evaluation, name):
        unknown = dict.fromkeys([name], [None] * 16)
        return evaluation.model_copy(
            update={"metrics": evaluation.metrics | {name: None}, "per_prompt": evaluation.per_prompt | unknown}
        )

    for name in ("harm", "valid"):
        found = confirm(cautious, without(BASE, name), without(good, name), GOAL)
        assert found.verdict == "unclear"
        assert f"{name} was defined on none of the report prompts" in found.evidence
    claims_nothing = cautious.model_copy(update={"raises": []})
    assert confirm(claims_nothing, BASE, good, GOAL).verdict == "unclear", "it had nothing to show"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    root = tmp_path_factory.mktemp("presets")
    store = Registry.open(root / "registry")
    for name in ("a", "b"):
        weights = {"model.norm.weight": torch.full((8,), 0.1)}
        vector = vector_from_state(weights, preference=name, base_fingerprint="blake3:" + "0" * 64)
        save_vector(vector, root / name)
        store.publish_vector(root / name)
    return store


def test_what_is_published_brings_its_evidence(result, registry):
    (cautious,) = choose(result, {"cautious": "harm"})
    refs = {"a": "a@1", "b": "b@1"}
    assert publish(registry, cautious, refs, {}) is None, "never measured on report prompts"
    refuted = confirm(cautious, BASE, on_report((0.2, 0.9), 0.1, 0.9, 1.0), GOAL)
    assert publish(registry, refuted, refs, {}) is None
    good = confirm(cautious, BASE, on_report((0.2, 0.9), 0.31, 0.25, 1.0, spread=0.02), GOAL)
    version = publish(registry, good, refs, {"scorer": "blake3:abc"})
    kept = registry.resolve_preset("cautious")
    assert kept == version
    assert kept.coefficients == {"a@1": 0.2, "b@1": 0.9}
    assert kept.metrics["harm"]["mean"] == pytest.approx(0.25)
    evidence = kept.metrics["evidence"]
    assert (evidence["verdict"], evidence["scorer"]) == ("confirmed", "blake3:abc")
    assert (evidence["search_prompts"], evidence["report_prompts"]) == ("search", "report")


def test_a_recommendation_by_the_search_prompts_alone(result, registry):
    refs = {"a": "a@1", "b": "b@1"}
    version = publish_searched(registry, result, "quick", refs)
    kept = registry.resolve_preset("quick")
    assert kept == version
    assert kept.coefficients == {refs[name]: eta for name, eta in result.recommended.coefficients.items()}
    assert (kept.reason, "evidence" in kept.metrics) == (result.recommended.reason, False)
    assert kept.metrics["harm"]["n"] == 16
    alone = SearchResult(goal=GOAL, trials=result.trials[:1])
    assert publish_searched(registry, alone, "nothing", refs) is None
    assert "nothing" not in {preset.name for preset in registry.list_presets()}


def test_each_coefficient_alone():
    bounds = SearchConfig(objectives=["x"], ranges={"b": (0.0, 2.0)}).bounds(["a", "b"])
    assert along(bounds, 3) == [
        {"a": -1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0},
        {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 2.0},
    ]  # fmt: skip


def test_an_unpublished_preset_stays_in_the_summary(result, registry, task):
    presets = choose(result, {"cautious": "harm", "help": "help"})
    confirmed = [
        confirm(presets[0], BASE, on_report((0.2, 0.9), 0.31, 0.25, 1.0, spread=0.02), GOAL),
        confirm(presets[1], BASE, on_report((0.7, 0.3), 0.1, 0.45, 1.0), GOAL),
    ]
    summary = result.summary().model_copy(update={"presets": confirmed})
    found = publish_presets(summary, result, task, registry, {"a": "a@1", "b": "b@1"})
    assert [p.published is not None for p in found.presets] == [True, False]

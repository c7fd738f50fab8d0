"""The decisions of a search, on a made-up world: help and harm are known functions of the coefficients, with noise."""

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import optuna
import pytest

from prefvec_ray.evaluation import Estimate, Evaluation
from prefvec_ray.scorers import Metric
from prefvec_ray.search import Explorer, Goal, SearchConfig, Tried
from prefvec_ray.search.explore import Proposal
from prefvec_ray.search.options import Sampler
from prefvec_ray.search.result import Ended
from prefvec_ray.search.space import NEAR

METRICS = {
    "help": Metric(direction="maximize", low=0, high=1),
    "harm": Metric(direction="minimize", low=0, high=1),
    "valid": Metric(direction="maximize", low=0, high=1),
}
GOAL = Goal(objectives=("help", "harm"), metrics=METRICS, limits={"valid": 0.9})
BOUNDS = {"a": (-1.0, 1.0), "b": (-1.0, 1.0)}
RUNGS = (16, 48)
World = Callable[[dict[str, float]], list[Evaluation]]


def explore(
    rungs: Sequence[int] = RUNGS,
    ranges: dict[str, tuple[float, float]] = BOUNDS,
    known: Sequence[Tried] = (),
    end: Ended | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Explorer:
    """Without patience, unless a test asks for it."""
    settings: dict[str, Any] = {"objectives": GOAL.objectives, "limits": GOAL.limits, "patience": None} | options
    config = SearchConfig(ranges=ranges, **settings)
    return Explorer(config, METRICS, list(ranges), rungs, known=known, end=end, clock=clock)


def proposed(explorer: Explorer) -> Proposal:
    """The next setting, where there must be one."""
    proposal = explorer.propose()
    assert proposal is not None
    return proposal


def opened(explorer: Explorer, **options: Any) -> Explorer:
    """The same search opened again, or with other options."""
    config = explorer.config.model_copy(update=options)
    return Explorer(config, METRICS, list(BOUNDS), explorer.rungs, known=explorer.tried, end=explorer.final())


@pytest.fixture
def world(measured):
    """Coefficients -> what each rung says: help grows with a and falls with b, harm the other way, a+b > 1.6 breaks."""

    def rungs(c: dict[str, float]) -> list[Evaluation]:
        help = 0.5 + 0.3 * math.tanh(2 * c["a"]) - 0.05 * c["b"]
        harm = 0.5 - 0.3 * math.tanh(2 * c["b"]) + 0.05 * c["a"]
        valid = 1.0 if c["a"] + c["b"] <= 1.6 else 0.5
        rng = random.Random(str(sorted(c.items())))
        found = []
        for noise in (0.06, 0.03):
            ease = [0.1 * math.sin(i) for i in range(16)]  # what all settings find hard or easy
            columns = [[mean + e + rng.gauss(0, noise) for e in ease] for mean in (help, harm)]
            found.append(measured(c, help=columns[0], harm=columns[1], valid=[valid] * 16))
        return found

    return rungs


def climb(explorer: Explorer, world: World, in_flight: int = 3) -> None:
    """Carry the search out to its end."""
    flying: list[Proposal] = []
    while True:
        while len(flying) < in_flight and (proposal := explorer.propose()):
            flying.append(proposal)
        if not flying:
            return
        proposal, seen = flying.pop(0), []
        for evaluation in world(proposal.coefficients)[-len(explorer.rungs) :]:
            seen.append(evaluation)
            if not explorer.promising(seen):
                break
        complete = len(seen) == len(explorer.rungs)
        tried = Tried(rungs=seen, complete=complete, answers=sum(explorer.rungs[: len(seen)]))
        explorer.finish(proposal.number, tried)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name in get_args(Sampler) if name != "auto"])
def test_every_sampler_begins_with_the_base_stays_in_bounds_and_ends(sampler, world):
    bounds = {"a": (-0.5, 1.0), "b": (0.0, 1.0)}
    explorer = explore(ranges=bounds, trials=18, start=[{"a": 0.2, "b": 0.2}], sampler=sampler, grid_steps=4)
    climb(explorer, world)
    result = explorer.result()
    tried = [t.coefficients for t in explorer.tried]
    assert tried[:2] == [{"a": 0.0, "b": 0.0}, {"a": 0.2, "b": 0.2}]
    count = 18 if sampler != "grid" else 17  # 4 x 4 points, the base among them, and the start setting
    assert len({tuple(c.values()) for c in tried}) == len(tried) == count, "nothing is measured twice"
    assert all(-0.5 <= c["a"] <= 1 and 0 <= c["b"] <= 1 for c in tried)
    assert result.answers == 64 * len(result.trials) + 16 * len(result.dropped)
    assert result.spent[-1] <= result.answers
    assert all(GOAL.keeps_limits(trial) for trial in result.front)
    assert result.stopped == (
        "every point of the grid was tried" if sampler == "grid" else "all 18 settings were tried"
    )


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_no_setting_is_measured_twice_nor_by_two_at_once(sampler, world):
    """NSGA-II's children often equal their parents, and a model's best guess is where it has measured already."""
    explorer = explore(trials=60, sampler=sampler, seed=1, start=[{"a": 1.0, "b": 0.601}])
    climb(explorer, world, in_flight=8)
    tried = [t.coefficients for t in explorer.tried]
    assert len(tried) == 60
    for one, other in itertools.combinations(tried, 2):
        assert max(abs(one[name] - other[name]) for name in one) / 2 >= NEAR
    assert tried[1] == {"a": 1.0, "b": 0.601}, "what a caller names is taken as it is"
    assert all(round(eta, 2) == eta for setting in tried[2:] for eta in setting.values())


def test_a_proposal_that_is_known_gives_way_to_a_gap_in_the_front(world):
    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return 0.9

    explorer = explore(trials=8, sampler="random", start=[{"a": 0.9, "b": 0.9}, {"a": 0.9, "b": -0.9}])
    explorer._study.sampler = Stubborn()
    climb(explorer, world, in_flight=1)
    tried = [tuple(t.coefficients.values()) for t in explorer.tried]
    assert len(set(tried)) == 8
    assert tried[3] != (0.9, 0.9)


@pytest.mark.slow
def test_a_front_at_a_corner_is_not_measured_again_and_again(measured):
    """Help and harm are both best at (1, 1): a sampler that knows so would go there each time."""

    def rungs(c: dict[str, float]) -> list[Evaluation]:
        help, harm = 0.5 + 0.2 * c["a"] + 0.1 * c["b"], 0.5 - 0.2 * c["b"] - 0.1 * c["a"]
        return [measured(c, help=[help] * 16, harm=[harm] * 16, valid=[1.0] * 16)] * 2

    explorer = explore(trials=20, sampler="gp")
    climb(explorer, rungs, in_flight=4)
    tried = [t.coefficients for t in explorer.tried]
    assert {"a": 1.0, "b": 1.0} in tried
    assert not any(explorer.space.near(point, tried[:i]) for i, point in enumerate(tried))


def test_a_small_range_with_many_trials_repeats_nothing(world):
    explorer = explore(ranges={"a": (-0.1, 0.1)}, trials=70, sampler="random", rungs=(64,))
    climb(explorer, lambda c: [rung.model_copy(update={"coefficients": c}) for rung in world(c | {"b": 0.0})])
    tried = [t.coefficients["a"] for t in explorer.tried]
    assert len(set(tried)) == 70


def test_a_search_whose_first_settings_were_not_rounded_does_not_repeat_them(world):
    """Journals of earlier versions hold them."""
    explorer = explore(trials=12, sampler="tpe")
    exact = [{"a": 0.0, "b": 0.0}, *explorer.space.spread(6)]
    known = [Tried(rungs=world(point), complete=True, answers=64) for point in exact]
    resumed = explore(trials=12, sampler="tpe", known=known)
    climb(resumed, world)
    tried = [t.coefficients for t in resumed.tried]
    assert len(tried) == 12
    assert not any(resumed.space.near(point, tried[:i]) for i, point in enumerate(tried[7:], start=7))


@pytest.mark.slow
def test_a_model_of_the_world_beats_chance_and_dropping_saves_answers(world):
    """At equal cost, over two seeds; the full comparison on trained vectors is benchmarks/bench_search.py."""
    volume = {}
    for sampler, rungs in (("gp", RUNGS), ("random", (64,))):
        found = []
        for seed in range(2):
            explorer = explore(rungs, trials=500, answers=16 * 64, sampler=sampler, seed=seed)
            climb(explorer, world)
            assert explorer.answers <= 16 * 64
            assert "budget of 1024 answers" in explorer.ended
            found.append(explorer.result().hypervolume)
            if len(rungs) > 1:
                assert explorer.result().dropped, "some settings are plainly beaten after a quarter of their answers"
        volume[sampler] = sum(found) / 2
    assert volume["gp"] > volume["random"]


def test_a_dropped_setting_is_beaten_beyond_error_and_the_base_never_is(world, measured):
    explorer = explore()
    climb_one = proposed(explorer)
    base, strong = world(climb_one.coefficients), world({"a": 0.9, "b": 0.6})
    explorer.finish(climb_one.number, Tried(rungs=base, complete=True, answers=64))
    explorer.finish(proposed(explorer).number, Tried(rungs=strong, complete=True, answers=64))
    assert explorer.promising(base[:1]), "the base is what everything is compared with"
    weak = world({"a": -0.9, "b": -0.9})
    assert not explorer.promising(weak[:1])
    assert explorer.promising(weak), "after the last rung there is nothing left to save"
    assert explorer.promising(world({"a": 0.9, "b": 0.55})[:1]), "too close to call"
    assert not explorer.promising(world({"a": 1.0, "b": 0.9})[:1]), "breaks the limit on every prompt"


def test_it_stops_when_the_front_has_stopped_moving(world):
    explorer = explore(trials=200, patience=10, sampler="tpe")
    climb(explorer, world)
    assert 20 <= len(explorer.tried) < 200
    assert "the front has stopped moving: the last 10 settings added" in explorer.ended
    again = opened(explorer)
    assert again.result() == explorer.result(), "a finished search is still finished when it is opened again"
    assert again.propose() is None


@pytest.fixture
def still(measured: Callable[..., Evaluation]) -> Explorer:
    """A search that its front ended at the sixth setting, with one in flight that would have moved the front."""
    explorer = explore((8,), trials=50, patience=3, sampler="random")

    def finish(proposal: Proposal, help: float) -> bool:
        harm = 0.5 if help < 0.9 else 0.1
        evaluation = measured(proposal.coefficients, help=[help] * 8, harm=[harm] * 8, valid=[1.0] * 8)
        return explorer.finish(proposal.number, Tried(rungs=[evaluation], complete=True, answers=8))

    proposals = [proposal for _ in range(8) if (proposal := explorer.propose())]
    for proposal, help in zip(proposals[:6], (0.5, 0.6, 0.7, 0.4, 0.3, 0.2), strict=True):
        assert not explorer.closed
        assert finish(proposal, help)
    assert explorer.closed
    assert not finish(proposals[6], 0.95)
    explorer.fail(proposals[7].number, proposals[7].coefficients, "TimeoutError: the judge sleeps")
    return explorer


def test_a_front_is_not_judged_before_the_base_is_measured(measured):
    """The base may be the slowest of those in flight: its process died, or its node is busy."""
    explorer = explore((8,), trials=50, patience=2, sampler="random")
    base, *others = (proposed(explorer) for _ in range(6))
    for proposal in (*others, base):
        assert not explorer.ended
        evaluation = measured(proposal.coefficients, help=[0.5] * 8, harm=[0.5] * 8, valid=[1.0] * 8)
        assert explorer.finish(proposal.number, Tried(rungs=[evaluation], complete=True, answers=8))
    assert "added nothing" in explorer.ended


def test_a_limit_beside_the_base_is_a_number_once_the_base_is_measured(measured):
    """Whenever that is, and also where the search is opened again."""
    limits = {"valid": "base - 0.1", "harm": " base+.25 ", "help": 0.2}
    explorer = explore((8,), trials=12, sampler="random", limits=limits)
    base, *others = (proposed(explorer) for _ in range(4))
    assert explorer.goal.limits == {"help": 0.2}
    for number, (proposal, valid) in enumerate(zip([*others, base], (0.65, 0.75, 0.7, 0.8), strict=True)):
        values = {"help": [0.5 + number / 10] * 8, "harm": [0.5] * 8, "valid": [valid] * 8}
        evaluation = measured(proposal.coefficients, **values)
        assert explorer.finish(proposal.number, Tried(rungs=[evaluation], complete=True, answers=8))
    assert explorer.goal.limits == pytest.approx({"help": 0.2, "valid": 0.7, "harm": 0.75})
    result = explorer.result()
    assert [trial.coefficients for trial in result.front] == [base.coefficients], "best in help, and keeps them all"
    assert [result.goal.keeps_limits(trial) for trial in result.trials] == [False, True, True, True]
    assert result.recommended is not None
    assert "valid at least 0.7 (base - 0.1)" in result.recommended.reason
    assert "harm at most 0.75 (base + 0.25)" in result.recommended.reason
    assert opened(explorer).goal == explorer.goal
    assert opened(explorer, limits={"valid": "base"}).goal.limits == {"valid": 0.8}


@pytest.mark.parametrize("limit", ["base - ", "base * 0.9", "bases", "0.5 - base", "base - 0.1 - 0.1", "base--1", ""])
def test_a_limit_is_a_number_or_beside_the_base(limit):
    with pytest.raises(ValueError, match=r"limits\.valid"):
        SearchConfig(objectives=["help"], limits={"valid": limit})


def test_a_base_that_does_not_define_what_is_limited_beside_it_fails(measured):
    explorer = explore((8,), trials=12, sampler="random", limits={"valid": "base"})
    for _ in range(2):
        base = proposed(explorer)
        evaluation = measured(base.coefficients, help=[0.5] * 8, harm=[0.5] * 8, valid=[None] * 8)
        assert not explorer.finish(base.number, Tried(rungs=[evaluation], complete=True, answers=8))
    assert "'valid', which is limited beside the base's, was defined on none of the prompts" in explorer.ended


def test_a_last_bit_is_no_gain(measured):
    """Equal scores that were summed in another order, or on another processor, do not keep a search going."""
    explorer = explore((8,), trials=50, patience=2, sampler="random")
    help = 0.7
    for _ in range(4):
        assert not explorer.ended
        proposal = proposed(explorer)
        evaluation = measured(proposal.coefficients, help=[help] * 8, harm=[0.5] * 8, valid=[1.0] * 8)
        explorer.finish(proposal.number, Tried(rungs=[evaluation], complete=True, answers=8))
        help = math.nextafter(help, 1)
    assert explorer.ended == "the front has stopped moving: the last 2 settings added nothing to its hypervolume"


def test_what_was_in_flight_when_the_front_stood_still_does_not_count(still):
    assert still.ended == "the front has stopped moving: the last 3 settings added nothing to its hypervolume"
    result = still.result()
    assert (len(result.trials), result.answers, result.failed) == (6, 48, [])
    assert max(trial.mean("help") for trial in result.trials) == 0.7


def test_a_search_opened_again_ends_as_it_did(still, measured):
    again = opened(still)
    assert again.result().model_dump_json() == still.result().model_dump_json()
    # Also where the last bits of another processor would decide otherwise: here by a setting that moves the front.
    best = measured({"a": 1.0, "b": -1.0}, help=[0.95] * 8, harm=[0.1] * 8, valid=[1.0] * 8)
    moved = [*still.tried[:-1], Tried(rungs=[best], complete=True, answers=8)]
    assert not replace(still, known=moved).ended
    assert replace(still, known=moved, end=still.final()).ended == still.ended


@pytest.mark.parametrize(
    ("asked", "goes_on"),
    [
        ({"patience": 4}, True),
        ({"patience": None}, True),
        ({"trials": 90}, False),  # its front still stands still
        ({"patience": 2}, False),
        ({"trials": 6, "patience": 4}, False),
    ],
)
def test_asked_for_more_it_decides_anew_from_what_was_measured(still, asked, goes_on):
    again = opened(still, **asked)
    assert (again.propose() is not None) == goes_on
    assert bool(again.ended) != goes_on


def test_a_used_up_plan_is_kept_with_its_failures_and_a_larger_one_goes_on(world):
    explorer = explore(trials=5, sampler="random")
    proposals = [proposed(explorer) for _ in range(5)]
    assert explorer.final() is None, "settings in flight are still part of the plan"
    explorer.fail(proposals[3].number, proposals[3].coefficients, "TimeoutError: the judge sleeps")
    for proposal in (*proposals[:3], proposals[4]):
        assert explorer.finish(proposal.number, Tried(rungs=world(proposal.coefficients), complete=True, answers=64))
    end = explorer.final(seconds=12.5)
    assert end is not None
    assert (end.stopped, end.seconds) == ("all 5 settings were tried", 12.5)
    again = opened(explorer)
    assert again.result() == explorer.result()
    assert len(again.result().failed) == 1
    more = opened(explorer, trials=7)
    assert [more.propose() is None for _ in range(4)] == [False, False, False, True], "a failed setting does not count"


def test_seconds_are_a_budget_too(world):
    now = [0.0]
    explorer = explore(seconds=60, clock=lambda: now[0])
    assert explorer.propose() is not None
    now[0] = 61.0
    assert explorer.propose() is None
    assert explorer.ended == "the 60 seconds are over"


def test_a_budget_in_flight_is_not_spent_twice(world):
    explorer = explore(answers=150)
    first, second = proposed(explorer), proposed(explorer)
    assert explorer.propose() is None, "150 answers are two settings of 64"
    assert not explorer.ended, "one that is dropped early would leave room for another"
    explorer.finish(first.number, Tried(rungs=world(first.coefficients), complete=True, answers=64))
    explorer.finish(second.number, Tried(rungs=world(second.coefficients)[:1], complete=False, answers=16))
    assert explorer.propose() is not None


def test_going_on_repeats_nothing_and_learns_from_what_is_known(world):
    first = explore(trials=12, seed=4, sampler="tpe")
    climb(first, world)
    second = explore(trials=16, seed=4, sampler="tpe", known=first.tried)
    climb(second, world)
    assert second.tried[:12] == first.tried
    assert len(second.tried) == 16
    assert len({tuple(t.coefficients.values()) for t in second.tried}) == 16


def test_when_most_settings_fail_it_says_so_and_stops(world):
    explorer = explore(trials=40)
    base = proposed(explorer)
    explorer.finish(base.number, Tried(rungs=world(base.coefficients), complete=True, answers=64))
    for _ in range(3):
        assert not explorer.ended
        proposal = proposed(explorer)
        explorer.fail(proposal.number, proposal.coefficients, "TimeoutError: the judge sleeps")
    assert explorer.ended == "most settings fail, 3 of 4; the last one with: TimeoutError: the judge sleeps"
    assert explorer.propose() is None
    assert len(explorer.result().failed) == 3
    assert explorer.final() is None, "failures may be over when the search is opened again"


def test_the_base_is_tried_twice_and_then_there_is_no_search(world):
    explorer = explore()
    for _ in range(2):
        base = proposed(explorer)
        assert base.coefficients == {"a": 0.0, "b": 0.0}
        explorer.fail(base.number, base.coefficients, "OSError: no disk")
    assert explorer.ended == "the base itself could not be measured: OSError: no disk"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_no_wrong_number_enters_the_front(value, world, measured):
    explorer = explore()
    base = proposed(explorer)
    explorer.finish(base.number, Tried(rungs=world(base.coefficients), complete=True, answers=64))
    proposal = proposed(explorer)
    wrong = measured(proposal.coefficients, help=[0.9] * 16, harm=[0.0] * 16, valid=[1.0] * 16)
    help = None if value is None else Estimate(mean=value, stderr=0.0, n=16)
    wrong = wrong.model_copy(update={"metrics": {**wrong.metrics, "help": help}})
    assert not explorer.finish(proposal.number, Tried(rungs=[wrong, wrong], complete=True, answers=64))
    assert explorer.result().front == [explorer.result().base]
    assert "'help'" in explorer.failed[0].error


def test_six_preferences(measured):
    """`auto` leaves Gaussian processes alone there: one proposal would take them many seconds."""
    names = [f"p{i}" for i in range(6)]
    metrics = {name: Metric(direction="maximize", low=0, high=1) for name in names}
    config = SearchConfig(objectives=names, trials=20, patience=None)

    def world(c: dict[str, float]) -> list[Evaluation]:
        crowd = sum(max(0.0, x) for x in c.values()) / 6
        return [measured(c, **{n: [0.5 + 0.3 * c[n] - 0.1 * crowd] * 8 for n in names})]

    explorer = Explorer(config, metrics, names, (8,))
    climb(explorer, world)
    result = explorer.result()
    assert explorer.sampler == "tpe"
    assert len(result.trials) == 20
    assert result.recommended is not None
    assert result.hypervolume_history == sorted(result.hypervolume_history)

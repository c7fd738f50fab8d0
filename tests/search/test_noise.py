import math
import random

import numpy as np
import pytest
from moocore import is_nondominated

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import Evaluation
from prefvec_ray.evaluation.evaluate import compare_metric
from prefvec_ray.scorers import Metric
from prefvec_ray.search import Goal, SearchResult
from prefvec_ray.search.noise import MeasuredSettings

METRICS = {
    "help": Metric(direction="maximize", low=0, high=1),
    "harm": Metric(direction="minimize", low=0, high=1),
}
GOAL = Goal(objectives=("help", "harm"), metrics=METRICS)


def noisy(mean: float, seed: int, error: float = 0.0, prompts: int = 16) -> list[float]:
    """Values whose mean is exact, spread by `error` in a way of their own."""
    rng = random.Random(seed)
    spread = [rng.gauss(0, error) for _ in range(prompts)]
    return [mean + x - sum(spread) / prompts for x in spread]


def test_a_setting_leaves_the_front_only_when_another_is_better_beyond_the_paired_error(measured):
    clear = measured({"a": 0.0}, help=noisy(0.5, 1, 0.2), harm=noisy(0.5, 2, 0.2))
    shifted = [x - 0.01 for x in clear.per_prompt["help"]]
    by_a_hair = measured({"a": 1.0}, help=noisy(0.49, 3, 0.2), harm=clear.per_prompt["harm"])
    for_sure = measured({"a": 2.0}, help=shifted, harm=clear.per_prompt["harm"])
    table = MeasuredSettings(GOAL, [clear, by_a_hair, for_sure])
    assert list(table.front()) == [True, True, False], (
        "0.01 less on every prompt is certain, 0.01 less on average is not"
    )
    assert list(table.front(errors=0)) == [True, False, False], "without errors, the plain front of the means"


def test_the_plain_front_always_survives(measured):
    rng = random.Random(0)
    trials = [
        measured({"a": i / 40}, help=noisy(rng.random(), i, 0.1), harm=noisy(rng.random(), 99 + i, 0.1))
        for i in range(40)
    ]
    front = MeasuredSettings(GOAL, trials).front()
    assert all(front[is_nondominated([GOAL.point(trial) for trial in trials], maximise=True)])


def test_paired_errors_are_those_of_compare(measured):
    a = measured({"a": 0.0}, help=[0.1, None, 0.9, 0.4], harm=[0.2, 0.2, 0.1, 0.0])
    b = measured({"a": 1.0}, help=[0.3, 0.5, None, 0.5], harm=[0.2, 0.3, 0.1, 0.1])
    from prefvec_ray.search.noise import _paired

    table = MeasuredSettings(GOAL, [a, b])
    mean, error = _paired(table.gains_SOP, table.gains_SOP)
    for o, name in enumerate(GOAL.objectives):
        expected = compare_metric(a, b, name)
        assert expected is not None
        sign = 1 if METRICS[name].direction == "maximize" else -1
        assert mean[0, 1, o] == pytest.approx(sign * expected.mean)
        assert error[0, 1, o] == pytest.approx(expected.stderr)
    assert not error[0, 0].any()


def test_large_numbers_with_small_differences_keep_them(measured):
    goal = Goal(objectives=("words",), metrics={"words": Metric(direction="minimize", low=0)})
    a = measured({"a": 0.0}, words=[1e8 + x for x in (0.0, 1.0, 2.0)])
    b = measured({"a": 1.0}, words=[1e8 + x + 0.5 for x in (0.0, 1.0, 2.0)])
    assert list(MeasuredSettings(goal, [a, b]).front()) == [True, False]


def test_limits_are_part_of_it(measured):
    goal = Goal(objectives=("help",), metrics=METRICS, limits={"harm": 0.4})
    fine = measured({"a": 0.0}, help=0.5, harm=0.4)
    breaks = measured({"a": 1.0}, help=0.9, harm=0.41)
    unknown = measured({"a": 2.0}, help=0.9, harm=[None, None])
    table = MeasuredSettings(goal, [fine, breaks, unknown])
    assert list(table.front()) == [True, False, False]
    assert list(table.front_probabilities()) == [1.0, 0.0, 0.0]
    assert [goal.keeps_limits(e) for e in (fine, breaks, unknown)] == [True, False, False]


def test_the_chance_to_be_on_the_front(measured):
    """Two settings whose difference in `help` is noise share it; one that is worse everywhere has none."""
    flat = [0.5] * 64
    one = measured({"a": 0.0}, help=noisy(0.50, 1, 0.2, 64), harm=flat)
    other = measured({"a": 1.0}, help=noisy(0.50, 2, 0.2, 64), harm=flat)
    worse = measured({"a": 2.0}, help=noisy(0.10, 3, 0.2, 64), harm=flat)
    chances = MeasuredSettings(GOAL, [one, other, worse]).front_probabilities(400)
    assert chances[0] == pytest.approx(0.5, abs=0.1)
    assert chances[0] + chances[1] == pytest.approx(1)
    assert chances[2] == 0


def test_a_gain_in_volume_has_the_error_that_other_prompts_show(measured):
    """The bootstrap's error of a gain against its spread over freshly drawn prompts."""

    def table(seed: int) -> list[Evaluation]:
        base = measured({"a": 0.0}, help=noisy(0.5, seed, 0.0), harm=[0.5] * 16)
        rng = random.Random(seed)
        return [base, measured({"a": 1.0}, help=[0.6 + rng.gauss(0, 0.2) for _ in range(16)], harm=[0.5] * 16)]

    gains = [max(0, SearchResult(goal=GOAL, trials=table(s)).trials[1].mean("help") - 0.5) * 0.5 for s in range(200)]
    errors = [MeasuredSettings(GOAL, table(s)).gain_error(1, (0.0, -1.0)) for s in range(20)]
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.25)


def test_evaluations_of_other_prompts_do_not_mix(measured):
    a = measured({"a": 0.0}, help=0.5, harm=0.5)
    with pytest.raises(InputError, match="cannot share a front"):
        MeasuredSettings(GOAL, [a, a.model_copy(update={"prompts_digest": "other"})])


def test_what_is_recommended_rests_on_no_few_lucky_prompts(measured):
    """Setting 1 leads by the mean because of two prompts of 16; setting 2 is nearly as good on all of them."""
    harm = [0.5] * 16
    base = measured({"a": 0.0}, help=[0.2] * 16, harm=harm)
    lucky = measured({"a": 1.0}, help=[1.0] * 2 + [0.2] * 14, harm=[0.2] * 2 + [0.5] * 14)
    steady = measured({"a": 2.0}, help=[0.295] * 16, harm=[0.465] * 16)
    result = SearchResult(goal=GOAL, trials=[base, lucky, steady])
    assert result.recommended is not None
    assert result.recommended.coefficients == {"a": 2.0}


def test_a_lucky_best_of_many_says_how_lucky(measured):
    """30 settings that are all the base and noise: the best of them looks better than it is, by about what is said."""
    base = measured({"a": 0.0}, help=[0.5] * 32, harm=[0.5] * 32)
    rng = random.Random(1)
    trials = [
        measured({"a": float(i)}, help=[0.5 + rng.gauss(0, 0.2) for _ in range(32)], harm=[0.5] * 32)
        for i in range(1, 31)
    ]
    goal = Goal(objectives=("help",), metrics=METRICS)
    chosen = SearchResult(goal=goal, trials=[base, *trials]).recommended
    assert chosen is not None
    seen = max(trial.mean("help") for trial in trials) - 0.5
    assert seen > 0.04
    assert chosen.optimism["help"] == pytest.approx(seen, rel=0.6)
    assert math.isfinite(chosen.optimism["help"])

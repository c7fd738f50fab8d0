import itertools
from dataclasses import replace

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.search.rungs import plan_rungs


@pytest.mark.parametrize(
    ("shares", "answers"),
    [
        ((1.0,), [32]),
        ((0.25, 1.0), [8, 24]),
        ((0.125, 0.5, 1.0), [4, 12, 16]),
        ((0.3, 0.6, 1.0), [8, 8, 16]),
        ((0.01, 1.0), [1, 31]),
    ],
)
def test_rungs_add_up_to_every_answer_once(shares, answers):
    rungs = plan_rungs(8, 4, shares)
    assert [sum(block.answers for block in blocks) for blocks in rungs] == answers
    asked = [0] * 8
    for block in itertools.chain(*rungs):
        for i in block.prompts:
            asked[i] += block.samples
    assert asked == [4] * 8
    assert len({block.seed for block in itertools.chain(*rungs)}) == len(list(itertools.chain(*rungs)))


def test_one_answer_a_prompt_is_split_by_prompts_and_not_in_their_order():
    (first,), (second,) = plan_rungs(20, 1, (0.5, 1))
    assert sorted(first.prompts + second.prompts) == list(range(20))
    assert first.prompts != tuple(range(10)), "the first prompts of a file may be all of one kind"
    assert plan_rungs(20, 1, (0.5, 1)) == [[first], [second]], "the same for every setting and after a restart"


@pytest.mark.parametrize("shares", [(), (0.5,), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0), (0.5, 2.0)])
def test_shares_that_make_no_schedule(shares):
    with pytest.raises(InputError, match="expected rising shares"):
        plan_rungs(8, 4, shares)


def test_a_schedule_measures_each_answer_once_and_joins_them(task):
    task = replace(task, sampling=task.sampling.model_copy(update={"samples_per_prompt": 4}))
    schedule = task.fidelity_schedule((0.25, 0.5, 1.0))
    settings = [{"left": 0.5}, {"left": -0.5, "right": 0.3}]
    measured = [list(schedule.evaluate_rungs(setting)) for setting in settings]
    for rungs in measured:
        first, second, third = rungs
        parts = [evaluator.evaluate(rungs[0].coefficients) for evaluator in schedule.evaluators]
        for name in ("length", "letters"):
            for i in range(len(task.prompts)):
                samples = [part.per_prompt[name][i] for part in parts]
                assert first.per_prompt[name][i] == samples[0]
                assert second.per_prompt[name][i] == pytest.approx((samples[0] + samples[1]) / 2)
                assert third.per_prompt[name][i] == pytest.approx((samples[0] + samples[1] + 2 * samples[2]) / 4)
        assert third.tokens == sum(part.tokens for part in parts)
    for one, other in zip(*measured, strict=True):
        assert one.prompts_digest == other.prompts_digest, "paired at every rung"
    assert len({evaluation.prompts_digest for evaluation in measured[0]}) == 3


def test_a_single_rung_is_a_plain_evaluation(task):
    (joined,) = task.fidelity_schedule((1.0,)).evaluate_rungs({"left": 1.0})
    plain = task.evaluator().evaluate({"left": 1.0})
    assert joined.model_copy(update={"seconds": 0.0}) == plain.model_copy(update={"seconds": 0.0})

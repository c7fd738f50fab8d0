import statistics

import pytest

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation import Evaluation, Evaluator, Metric, TinyWorldScorer, compare, scorer
from prefvec_ray.evaluation.evaluate import estimate


@scorer(
    length=Metric(direction="minimize", low=0),
    early=Metric(direction="maximize", low=0, high=1),
    never=Metric(direction="maximize", low=0, high=1),
)
def toy(prompts, responses):
    """`early` is undefined for prompts that begin with "Why"."""
    return {
        "length": [float(len(text)) for text in responses],
        "early": [
            None if p.startswith("Why") else float(text[:1] < "m") for p, text in zip(prompts, responses, strict=True)
        ],
        "never": [None] * len(responses),
    }


PROMPTS = ["How to comb a bear?", "Why?", "Tell me how to read a stone.", "How to wash a cloud?"]


@pytest.fixture
def evaluator(live, tokenizer) -> Evaluator:
    return Evaluator(live, tokenizer, PROMPTS, toy, draws=3, seed=1, max_new_tokens=10)


def test_standard_errors_are_over_prompts_and_undefined_is_never_zero(evaluator):
    result = evaluator.evaluate({"helpful": 0.5})
    length = result.metrics["length"]
    assert length.n == 4
    assert length.mean == pytest.approx(statistics.fmean(result.per_prompt["length"]))
    assert length.stderr == pytest.approx(statistics.stdev(result.per_prompt["length"]) / 2)
    assert result.per_prompt["early"][1] is None
    assert result.metrics["early"].n == 3
    assert result.metrics["never"] is None
    with pytest.raises(InputError, match="'never' was not measured"):
        result.mean("never")
    assert 0 < result.tokens <= 4 * 3 * 10
    assert Evaluation.model_validate_json(result.model_dump_json()) == result


def test_a_setting_scores_the_same_whatever_ran_before(evaluator):
    first = evaluator.evaluate({"helpful": 1.0})
    other = evaluator.evaluate({"harmless": -2.0})
    again = evaluator.evaluate({"helpful": 1.0, "harmless": 0.0})
    assert again.per_prompt == first.per_prompt
    assert [s.answer for s in again.samples] == [s.answer for s in first.samples]
    assert other.per_prompt != first.per_prompt


def test_comparison_is_paired_by_prompt(evaluator, live, tokenizer):
    a, b = evaluator.evaluate({"helpful": 1.0}), evaluator.evaluate({})
    difference = compare(a, b)
    by_hand = [x - y for x, y in zip(a.per_prompt["length"], b.per_prompt["length"], strict=True)]
    assert difference["length"] == estimate(by_hand)
    assert difference["length"].mean == pytest.approx(a.mean("length") - b.mean("length"))
    assert difference["early"].n == 3
    assert difference["never"] is None
    elsewhere = Evaluator(live, tokenizer, PROMPTS[:2], toy, draws=3, seed=1, max_new_tokens=10).evaluate({})
    with pytest.raises(InputError, match="not paired"):
        compare(a, elsewhere)


def test_one_prompt_has_no_standard_error():
    assert estimate([0.5, None]).stderr is None
    assert estimate([None, None]) is None
    assert str(estimate([0.5])) == "0.500"


def test_the_tiny_world_end_to_end(world, live, tokenizer):
    evaluator = Evaluator(live, tokenizer, world.prompts("search"), TinyWorldScorer(world), draws=2, max_new_tokens=8)
    result = evaluator.evaluate({})
    assert result.metrics["valid"].mean == 0, "an untrained model says nothing that parses"
    assert result.metrics["over_refusal"] is None
    assert len(result.samples) == 5
    assert len({sample.prompt for sample in result.samples}) == 5


def test_prompts_of_other_forms(live, tokenizer):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    talk = [*messages, {"role": "user", "content": "How to comb a bear?"}]

    @scorer(n=Metric(direction=None, low=0))
    def count(prompts, responses):
        return {"n": [float(len(prompt)) for prompt in prompts]}

    result = Evaluator(live, tokenizer, [talk], count, draws=1, max_new_tokens=4).evaluate({})
    assert result.metrics["n"].mean == 3
    assert result.samples[0].prompt == "How to comb a bear?"
    plain = Evaluator(live, tokenizer, ["abc"], count, draws=1, max_new_tokens=4, template=False)
    assert plain.texts == ["abc"]
    with pytest.raises(InputError, match="expected a text"):
        Evaluator(live, tokenizer, [7], count)
    with pytest.raises(InputError, match="no prompts"):
        Evaluator(live, tokenizer, [], count)


def test_unknown_vectors_are_refused(evaluator):
    with pytest.raises(InputError, match="polite"):
        evaluator.evaluate({"polite": 1.0})

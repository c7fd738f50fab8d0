import statistics

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation import Evaluation, Evaluator, Sampling, compare
from prefvec_ray.scorers import Metric, TextPrompt, TinyWorldScorer, scorer
from prefvec_ray.scorers.refusal import RefusalScorer
from prefvec_ray.vectors import LiveModel, PreferenceVector, fingerprint, to_low_rank, vector_from_state


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
def evaluator(live: LiveModel, tokenizer: PreTrainedTokenizerBase) -> Evaluator:
    sampling = Sampling(samples_per_prompt=3, seed=1, max_new_tokens=10)
    return Evaluator(live, tokenizer, PROMPTS, toy, sampling)


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
    length, early = difference["length"], difference["early"]
    assert length is not None
    assert early is not None
    assert length.mean == pytest.approx(a.mean("length") - b.mean("length"))
    assert early.n == 3
    assert difference["never"] is None
    elsewhere = Evaluator(
        live, tokenizer, PROMPTS[:2], toy, Sampling(samples_per_prompt=3, seed=1, max_new_tokens=10)
    ).evaluate({})
    with pytest.raises(InputError, match="not paired"):
        compare(a, elsewhere)


def test_one_prompt_has_no_standard_error():
    alone = estimate([0.5, None])
    assert alone is not None
    assert alone.stderr is None
    assert estimate([None, None]) is None
    assert str(estimate([0.5])) == "0.500"


def test_the_tiny_world_end_to_end(world, live, tokenizer):
    evaluator = Evaluator(
        live,
        tokenizer,
        world.prompts("search"),
        TinyWorldScorer(world),
        Sampling(samples_per_prompt=2, max_new_tokens=8),
    )
    result = evaluator.evaluate({})
    assert result.mean("valid") == 0, "an untrained model says nothing that parses"
    assert result.metrics["over_refusal"] is None
    assert len(result.samples) == 5
    assert len({sample.prompt for sample in result.samples}) == 5


def test_prompts_of_other_forms(live, tokenizer):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    talk = [*messages, {"role": "user", "content": "How to comb a bear?"}]

    @scorer(n=Metric(direction=None, low=0))
    def count(prompts, responses):
        return {"n": [float(len(prompt)) for prompt in prompts]}

    one = Sampling(samples_per_prompt=1, max_new_tokens=4)
    result = Evaluator(live, tokenizer, [talk], count, one).evaluate({})
    assert result.mean("n") == 3
    assert result.samples[0].prompt == "How to comb a bear?"
    plain = Evaluator(live, tokenizer, ["abc"], count, one, template=False)
    assert plain.texts == ["abc"]
    with pytest.raises(InputError, match="expected a text"):
        Evaluator(live, tokenizer, [7], count, one)
    with pytest.raises(InputError, match="no prompts"):
        Evaluator(live, tokenizer, [], count, one)


def test_unknown_vectors_are_refused(evaluator):
    with pytest.raises(InputError, match="polite"):
        evaluator.evaluate({"polite": 1.0})


@pytest.fixture
def low_rank(model: PreTrainedModel) -> LiveModel:
    """The live model, its vectors cut to rank 4, strong enough that greedy answers differ from the base's."""
    base = fingerprint(model)

    def vector(name: str, seed: int) -> PreferenceVector:
        generator = torch.Generator().manual_seed(seed)
        delta = {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        return to_low_rank(
            vector_from_state(delta, preference=name, base_fingerprint=base, dtype=torch.float32), rank=4
        )

    return LiveModel(model, {"helpful": vector("helpful", 1), "harmless": vector("harmless", 2)})


SETTINGS = [{}, {"helpful": 1.0}, {"helpful": -0.5, "harmless": 2.0}, {"harmless": 1.0}]


def test_many_settings_in_one_batch_are_the_merged_ones(low_rank, tokenizer):
    """Greedy and fp32: the answers are the same token for token, whatever shares the batch."""
    greedy = Sampling(samples_per_prompt=1, temperature=0, max_new_tokens=12)
    evaluator = Evaluator(low_rank, tokenizer, PROMPTS, toy, greedy, measures=["perplexity"])
    merged = evaluator.evaluate_many(SETTINGS, steer=False)
    together = evaluator.evaluate_many(SETTINGS, steer=True)
    assert [e.per_prompt["length"] for e in together] == [e.per_prompt["length"] for e in merged]
    assert [[s.answer for s in e.samples] for e in together] == [[s.answer for s in e.samples] for e in merged]
    assert len({tuple(s.answer for s in e.samples) for e in merged}) >= 3, "the settings do differ"
    for one, other in zip(together, merged, strict=True):
        assert one.per_prompt["perplexity"] == pytest.approx(other.per_prompt["perplexity"], rel=1e-4)
        assert (one.prompts_digest, one.coefficients) == (other.prompts_digest, other.coefficients)
    assert low_rank.coefficients == {"helpful": 0.0, "harmless": 0.0}


def test_many_settings_sample_with_the_same_random_numbers(low_rank, tokenizer):
    evaluator = Evaluator(
        low_rank, tokenizer, PROMPTS, toy, Sampling(samples_per_prompt=3, max_new_tokens=8), batch_size=7
    )
    same = evaluator.evaluate_many([{"helpful": 0.5}, {"helpful": 0.5}], steer=True)
    assert same[0].per_prompt == same[1].per_prompt


def test_what_cannot_be_steered_is_merged_or_refused(evaluator):
    assert [e.coefficients for e in evaluator.evaluate_many(SETTINGS)] == SETTINGS, "full vectors: one after another"
    with pytest.raises(InputError, match="full form"):
        evaluator.evaluate_many(SETTINGS, steer=True)
    with pytest.raises(InputError, match="polite"):
        evaluator.evaluate_many([{}, {"polite": 1.0}])


def test_prompts_that_cannot_be_scored_are_found_before_the_model_runs(live, tokenizer):
    prompts = [TextPrompt("How?", "safe"), TextPrompt("Why?", "Unsafe")]
    with pytest.raises(InputError, match="label 'Unsafe'; expected safe or unsafe"):
        Evaluator(live, tokenizer, prompts, RefusalScorer(), Sampling(samples_per_prompt=1))

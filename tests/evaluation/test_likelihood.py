import math
import statistics

import pytest
import torch

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.evaluation import Evaluator, Sampling
from prefvec_ray.evaluation.generate import sample_ids
from prefvec_ray.evaluation.likelihood import TokenPair, answer_measures, cut_pairs, log_probs, token_pairs
from prefvec_ray.evaluation.training_run import TrainingRun
from prefvec_ray.scorers import Metric, scorer
from prefvec_ray.vectors import Checkpoint, LiveModel, load_vector

PROMPT = [5, 9, 17, 40]
FAR = {"helpful": 4.0}


def next_log_probs(model, sequences, temperature=1.0):
    with torch.inference_mode():
        logits = model(torch.tensor(sequences)).logits[:, -1]
    return torch.log_softmax(logits.double() / temperature, -1)


def exact_kl(live, temperature, end):
    """KL of two-token answers by enumeration of the first token, from nothing but the definition."""

    def conditionals(coefficients):
        live.set_coefficients(coefficients)
        first = next_log_probs(live.model, [PROMPT], temperature)[0]
        return first, next_log_probs(live.model, [[*PROMPT, t] for t in range(len(first))], temperature)

    (p, p2), (q, q2) = conditionals(FAR), conditionals({})
    after = (p2.exp() * (p2 - q2)).sum(-1)
    after[end] = 0.0  # an answer that has ended goes no further
    return float((p.exp() * (p - q)).sum() + (p.exp() * after).sum())


def test_kl_is_unbiased_and_sharper_than_the_log_ratio(live, tokenizer):
    temperature, samples = 0.7, 2000
    live.set_coefficients(FAR)
    answers = sample_ids(
        live.model,
        tokenizer,
        [PROMPT],
        Sampling(samples_per_prompt=samples, temperature=temperature, max_new_tokens=2),
        batch_size=samples,
    )[0]
    kl = answer_measures(
        live.model,
        live.set_coefficients,
        FAR,
        [PROMPT] * samples,
        answers,
        measures=["kl"],
        temperature=temperature,
    )["kl"]
    measured = [value for value in kl if value is not None]
    assert len(measured) == samples
    exact = exact_kl(live, temperature, tokenizer.eos_token_id)
    error = statistics.stdev(measured) / math.sqrt(samples)
    assert exact > 0.05, "the setting is far enough from the base for the test to mean something"
    assert abs(statistics.fmean(measured) - exact) < 5 * error
    assert min(measured) >= 0

    ratios = []
    for coefficients in (FAR, {}):
        live.set_coefficients(coefficients)
        first = next_log_probs(live.model, [PROMPT], temperature)[0]
        second = next_log_probs(live.model, [[*PROMPT, a[0]] for a in answers], temperature)
        ratios.append(
            [float(first[a[0]]) + (float(second[i, a[1]]) if len(a) > 1 else 0) for i, a in enumerate(answers)]
        )
    plain = [p - q for p, q in zip(*ratios, strict=True)]
    assert statistics.stdev(measured) < 0.5 * statistics.stdev(plain)


def test_perplexity_is_the_bases_and_rounds_change_nothing(live, tokenizer):
    answers = [[7, 8, 9], [20], [], [11, 12, 13, 14, 15]]
    prompts = [PROMPT, [3], PROMPT, [1, 2]]

    def measure(**room):
        use, measures = live.set_coefficients, ["kl", "perplexity"]
        return answer_measures(live.model, use, FAR, prompts, answers, measures=measures, temperature=1.0, **room)

    whole = measure()
    assert whole["perplexity"][2] is None
    assert whole["kl"][2] is None
    live.set_coefficients({})
    for prompt, answer, found in zip(prompts, answers, whole["perplexity"], strict=True):
        if answer:
            steps = [next_log_probs(live.model, [prompt + answer[:i]])[0, t] for i, t in enumerate(answer)]
            assert found == pytest.approx(math.exp(-float(sum(steps)) / len(answer)), rel=1e-4)
    parts = measure(logits=4 * live.model.config.vocab_size)
    for name in whole:
        assert parts[name][2] is None
        some, all_ = ([value for value in found[name] if value is not None] for found in (parts, whole))
        assert some == pytest.approx(all_, rel=1e-3), "in as many rounds as the room asks for"


def test_a_model_that_breaks_down_has_no_measures(model, tokenizer):
    live = LiveModel(model, {})

    def use(coefficients):
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)

    for name in ("kl", "perplexity"):
        with pytest.raises(JobError, match=f"{name} of an answer is nan"):
            answer_measures(live.model, use, {}, [PROMPT], [[7]], measures=[name], temperature=1.0)


def test_margins_are_trls(demo_run):
    """What TRL measured of the positive run on its held-out pairs, found again from the run's delta alone."""
    from transformers import AutoModelForCausalLM

    run = TrainingRun(demo_run["folder"])
    assert (run.preferences, run.seeds, run.mixed) == (["helpful", "harmless"], [0], True)
    vectors = run.vectors(0)
    assert set(vectors) == {"helpful", "harmless", "helpful+", "harmless+", "mixed"}
    base = demo_run["folder"] / "base"
    live = LiveModel(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        {"helpful+": load_vector(vectors["helpful+"])},
        base=Checkpoint(base),
    )
    pairs = run.pairs()["helpful"]
    logps = []
    for coefficients in ({"helpful+": 1.0}, {}):
        live.set_coefficients(coefficients)
        both = [log_probs(live.model, [p.prompt for p in pairs], [p[side] for p in pairs]) for side in (1, 2)]
        logps.append([chosen - rejected for chosen, rejected in zip(*both, strict=True)])
    margins = [now - before for now, before in zip(*logps, strict=True)]
    wanted = ("helpful", "positive")
    recorded = next(r for r in run.summary.runs if (r.spec.preference, r.spec.polarity) == wanted)
    held_out, beta = recorded.held_out["helpful"], recorded.spec.dpo["beta"]
    assert held_out.pairs == len(pairs)
    assert beta * statistics.fmean(margins) == pytest.approx(held_out.margin, rel=0.02, abs=1e-4)
    assert statistics.fmean(m > 0 for m in margins) == pytest.approx(held_out.accuracy, abs=1 / len(pairs) + 1e-9)


SAMPLING = Sampling(samples_per_prompt=2, max_new_tokens=6)


@scorer(length=Metric(direction="minimize", low=0))
def length(prompts, responses):
    return {"length": [float(len(text)) for text in responses]}


def test_an_evaluator_measures_them_beside_the_scorer(live, tokenizer):
    pairs = {"helpful": [TokenPair([5, 6], [7, 8], [9]), TokenPair([5, 6], [7], [10]), TokenPair([4], [7], [11, 12])]}
    evaluator = Evaluator(
        live, tokenizer, ["How?", "Why?"], length, SAMPLING, measures=["kl", "perplexity"], pairs=pairs
    )
    assert list(evaluator.metrics) == ["length", "kl", "perplexity", "margin_helpful", "accuracy_helpful"]
    base, moved = evaluator.evaluate({}), evaluator.evaluate({"helpful": 1.0})
    assert set(base.metrics) == set(evaluator.metrics)
    assert base.mean("kl") == 0
    assert base.mean("margin_helpful") == 0
    assert base.mean("accuracy_helpful") == 0.5, "a base does not prefer: neither right nor wrong"
    assert moved.mean("kl") > 0
    assert moved.mean("margin_helpful") != 0
    margin = moved.metrics["margin_helpful"]
    assert margin is not None
    assert margin.n == 2, "errors are over prompts, and two pairs share one"
    assert live.coefficients == {"helpful": 0.0, "harmless": 0.0}
    other = Evaluator(live, tokenizer, ["How?", "Why?"], length, SAMPLING)
    assert other.digest != evaluator.digest


def test_pairs_are_taken_apart_as_trl_does_it(tokenizer):
    ask = [{"role": "user", "content": "How to comb a bear?"}]
    talk = {"prompt": ask, "chosen": [{"role": "assistant", "content": "Gently."}],
            "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip
    (pair,) = token_pairs(tokenizer, [talk])
    whole = tokenizer.apply_chat_template([*ask, *talk["chosen"]], return_dict=False)
    assert pair.prompt + pair.chosen == whole
    assert "Gently." in tokenizer.decode(pair.chosen)
    assert "bear" not in tokenizer.decode(pair.chosen)
    assert cut_pairs([pair], len(pair.prompt) + 1) == [TokenPair(pair.prompt, pair.chosen[:1], pair.rejected[:1])]
    assert cut_pairs([pair], len(pair.prompt)) == [], "nothing is left to compare"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ["loss"]}, "unknown measure 'loss'; known: kl, perplexity"),
        ({"measures": ["kl"], "sampling": Sampling(temperature=0)}, "'kl' needs a temperature above 0"),
        ({"pairs": {"helpful": []}}, "no held-out pairs for helpful"),
    ],
)
def test_bad_requests(change, message, live, tokenizer):
    with pytest.raises(InputError, match=message):
        Evaluator(live, tokenizer, ["How?"], length, **{"sampling": Sampling(), **change})


def test_a_scorers_metric_must_not_take_their_names(live, tokenizer):
    @scorer(kl=Metric(direction="minimize"))
    def taken(prompts, responses):
        return {"kl": [0.0] * len(responses)}

    with pytest.raises(InputError, match="two of what is measured state a metric 'kl'"):
        Evaluator(live, tokenizer, ["How?"], taken, Sampling(), measures=["kl"])

"""The case study's artifacts, on Gemma 3 270M: one tokenization, exact serving, exact exports."""

import json
import math

import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, Steering

BOS, END = 2, 1
"""Of Gemma's tokenizer: begins every text, ends every answer."""
LENGTHS = (100, 700, 4_000)
"""Tokens of a prompt: within the window of 512, beyond it, and seven windows long."""


@pytest.fixture(scope="module")
def prompts(base, runs):
    """Token ids of prompts of the three lengths: conversations of the training data, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = (runs / "gemma-data" / "reward-helpful.jsonl").read_text().splitlines()
    ids = tokenizer("".join(json.loads(row)["chosen"] for row in rows), add_special_tokens=False).input_ids
    return [(BOS, *ids[length : 2 * length - 1]) for length in LENGTHS]


def test_every_conversation_begins_once_and_every_answer_ends(runs):
    folders = [folder for folder in (runs / "gemma" / "reference").glob("*/*") if folder.name in ("train", "test")]
    assert len(folders) == 4
    for row in (row for folder in folders for row in load_from_disk(folder)):
        assert row["prompt_ids"][0] == BOS
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            assert (row["prompt_ids"] + answer).count(BOS) == 1
            assert (answer.count(END), answer[-1]) == (1, END)


def test_runs_start_at_the_reference(runs):
    """Loss log 2 and margin 0: the reference pass and the runs compute the same numbers."""
    for run in json.loads((runs / "gemma" / "training.json").read_text())["runs"]:
        assert run["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert run["history"][0]["margin"] == pytest.approx(0, abs=1e-3)


def test_a_positive_run_separates_held_out_pairs_better_than_its_negative(runs):
    summary = json.loads((runs / "gemma" / "training.json").read_text())
    found = {(run["spec"]["preference"], run["spec"]["polarity"]): run for run in summary["runs"]}
    for name in ("helpful", "harmless"):
        positive, negative = (found[name, polarity]["held_out"][name] for polarity in ("positive", "negative"))
        assert positive["margin"] > negative["margin"]


def test_merged_steered_and_mixed_answers_are_those_of_generate(base, vectors, prompts):
    """Token for token, at three lengths and three settings in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    settings = [{}, {"helpful": 1.0}, {"helpful": -0.5, "harmless": 1.0}]
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    requests = [Request(ids, tuple(setting.items()), sampling) for setting in settings for ids in prompts]

    def answers(engine):
        outputs: list[list[OutputDelta]] = [[] for _ in requests]
        for request, output in zip(requests, outputs, strict=True):
            engine.submit(request, output.append)
        while engine.step():
            pass
        return [[token for delta in output for token in delta.tokens] for output in outputs]

    live = LiveModel(model, vectors)
    expected = []
    for request in requests:
        live.set_coefficients(dict(request.coefficients))
        ids = torch.tensor([request.prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected.append(whole[0, len(request.prompt) :].tolist())
    assert answers(SlotEngine(MergedWeights(live), tokenizer)) == expected
    live.set_coefficients({})
    with Steering(model, vectors, base_fingerprint=live.base_fingerprint) as steering:
        assert answers(SlotEngine(SteeredWeights(steering), tokenizer)) == expected


@pytest.fixture(scope="module")
def exact(exact_logits, exported, prompts):
    return exact_logits(exported, prompts[0])


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_exports_load_with_the_logits_of_float64(form, base, runs, prompts, exact):
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(runs / "gemma-merged", dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, runs / "gemma-adapter")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompts[0]])).logits
    assert (logits.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_the_endpoint_answers_at_the_coefficients_that_it_was_asked_for(runs):
    lines = [json.loads(line) for line in (runs / "gemma-answers.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    asked = [{}, {"helpful": 1.0}, {"harmless": 1.0}, {"harmless": -1.0}, {"helpful": 0.5, "harmless": 0.5}]
    for number, line in enumerate(lines):
        used = {name: eta for name, eta in line["preferences"].items() if eta}
        assert used == asked[number % 5]
        assert line["choices"][0]["message"]["content"].strip()

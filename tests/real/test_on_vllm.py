"""The case study's base, vectors and exports in vLLM, against float64: run in the environment of `make env-vllm`."""

import gc
import json

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from prefvec_ray.serving.engines.vllm.options import WORKER

LENGTH = 300
"""Tokens of the text: more than a block of vLLM's cache on CPUs."""


@pytest.fixture(scope="module")
def text(base, runs):
    rows = (runs / "gemma-data" / "reward-helpful.jsonl").read_text().splitlines()
    joined = "".join(json.loads(row)["chosen"] for row in rows[:50])
    return [2, *AutoTokenizer.from_pretrained(base)(joined, add_special_tokens=False).input_ids[: LENGTH - 1]]


@pytest.fixture(scope="module")
def exact(exact_logits, text):
    """Coefficients -> log-probabilities of the text's tokens after the first, in float64, and the largest logit."""

    def of(etas):
        logits = exact_logits(etas, text)[0]
        likely = torch.log_softmax(logits[:-1], -1).gather(-1, torch.tensor(text[1:]).unsqueeze(-1)).squeeze(-1)
        return likely, logits.abs().max().item()

    return of


@pytest.fixture
def start():
    """Start vLLM; one at a time, ended with the test."""
    started = []

    def make(model, **options):
        started.append(LLM(str(model), dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**28, **options))
        return started[-1]

    yield make
    for llm in started:
        llm.llm_engine.engine_core.shutdown()
    started.clear()
    gc.collect()


def likely(llm, text, etas=None, **named):
    extra = {} if etas is None else {"extra_args": {"preferences": json.dumps(etas)}}
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, **extra)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=text)], params, use_tqdm=False, **named)
    return torch.tensor([at[token].logprob for token, at in zip(text[1:], output.prompt_logprobs[1:], strict=True)])


def check(found, truth):
    """A log-probability is a logit less the logarithm of their sum: as far off as two logits may be."""
    expected, largest = truth
    assert (found.double() - expected).abs().max() < 2 * 1e-4 * largest


def test_the_merged_export(start, runs, text, exact, exported):
    check(likely(start(runs / "gemma-merged"), text), exact(exported))


def test_the_adapter(start, base, runs, text, exact, exported):
    rank = json.loads((runs / "gemma-adapter" / "adapter_config.json").read_text())["r"]
    llm = start(base, enable_lora=True, max_lora_rank=rank)
    check(likely(llm, text, lora_request=LoRARequest("both", 1, str(runs / "gemma-adapter"))), exact(exported))


def test_steered_in_compiled_code(start, base, runs, text, exact, exported):
    section = {
        "registry": str((runs / "gemma" / "registry").absolute()),
        "vectors": {"helpful": "helpful@1", "harmless": "harmless@1"},
    }
    llm = start(base, worker_cls=WORKER, additional_config={"prefvec": section})
    for etas in ({}, exported, {"helpful": -0.5, "harmless": 1.0}):
        check(likely(llm, text, etas), exact(etas))

"""Log-probabilities: those of a lone merged model, one for each token of the text, the same whole and streamed."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.serving.engines.text import TokenTexts
from prefvec_ray.vectors import LiveModel, Steering

SETTING = (("harmless", 0.5), ("helpful", -0.5))


@pytest.fixture(scope="module")
def engine(request, base_folder, vectors, tokenizer):
    return SlotEngine(MergedWeights(LiveModel(LlamaForCausalLM.from_pretrained(base_folder), vectors)), tokenizer)


@pytest.fixture(scope="module")
def alone(base_folder, vectors):
    live = LiveModel(LlamaForCausalLM.from_pretrained(base_folder).eval(), vectors)
    live.set_coefficients(dict(SETTING))

    def logp(ids: list[int]) -> torch.Tensor:
        """What transformers computes for every position: (positions, vocabulary)."""
        with torch.inference_mode():
            return torch.log_softmax(live.model(torch.tensor([ids])).logits[0].float(), -1)

    return logp


def generate(engine: SlotEngine, *requests: Request) -> list[list[OutputDelta]]:
    said: list[list[Any]] = [[] for _ in requests]
    for request, pieces in zip(requests, said, strict=True):
        engine.submit(request, pieces.append)
    while engine.step():
        pass
    return said


def ask(prompt: list[int], **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "logprobs": 3} | sampling)
    return Request(tuple(prompt), SETTING, params)


@pytest.mark.parametrize("sampled", [False, True])
def test_they_are_those_of_a_lone_merged_model(engine, alone, tokenizer, sampled):
    prompt = tokenizer("the quick brown fox").input_ids
    other = ask(tokenizer("why not").input_ids, logprobs=None)
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3} if sampled else {}
    pieces, silent = generate(engine, ask(prompt, **settings), other)
    assert not any(piece.logprobs for piece in silent)
    tokens = [token for piece in pieces for token in piece.tokens]
    told = [entry for piece in pieces for entry in piece.logprobs]
    assert len(told) == len(tokens) - (tokens[-1] == tokenizer.eos_token_id)
    logp = alone(prompt + tokens)[len(prompt) - 1 :]
    for place, (token, entry) in enumerate(zip(tokens, told, strict=False)):
        assert entry.chosen.logprob == pytest.approx(float(logp[place, token]), abs=1e-4)
        best = logp[place].topk(3)
        assert [likely.logprob for likely in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [likely.text for likely in entry.top] == [tokenizer.decode([i]) for i in best.indices.tolist()]
    text = "".join(piece.text for piece in pieces)
    assert b"".join(entry.chosen.bytes for entry in told).decode(errors="replace") == text


def test_steered_rows_tell_the_same(base_folder, vectors, tokenizer, engine):
    steered = SlotEngine(SteeredWeights(Steering(LlamaForCausalLM.from_pretrained(base_folder), vectors)), tokenizer)
    request = ask(tokenizer("the lazy dog").input_ids)
    ((*_, one), (*_, other)) = (generate(each, request)[0] for each in (steered, engine))
    assert one.tokens == other.tokens
    assert one.logprobs[-1].chosen.logprob == pytest.approx(other.logprobs[-1].chosen.logprob, abs=1e-4)


def test_tokens_of_a_stop_string_are_not_told(engine, tokenizer):
    prompt = tokenizer("at 12:30").input_ids
    (whole,) = generate(engine, ask(prompt))
    text = "".join(piece.text for piece in whole)
    stop = text[9:12]
    (stopped,) = generate(engine, ask(prompt, stop=stop))
    said = "".join(piece.text for piece in stopped)
    assert said == text[: text.index(stop)]
    told = [entry for piece in stopped for entry in piece.logprobs]
    assert told == [entry for piece in whole for entry in piece.logprobs][: len(told)]
    assert told[-1].offset < len(said) <= told[-1].offset + len(told[-1].chosen.text)
    sent = 0
    for piece in stopped:  # nothing is told of text that is still held back
        sent += len(piece.text)
        assert all(entry.offset < sent for entry in piece.logprobs)


def test_a_token_of_half_a_character_shows_its_bytes(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tokenizer("crème 🙂").input_ids
    assert b"".join(texts[token][1] for token in ids).decode() == "crème 🙂"
    assert any(texts[token][0] == "\ufffd" for token in ids)

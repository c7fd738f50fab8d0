from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, PreTrainedModel, Qwen3Config

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import Sampling, sample
from prefvec_ray.evaluation.generate import answer_requests, by_prompt
from prefvec_ray.generation.offline import OfflineEngine
from prefvec_ray.generation.slots.weights import MergedWeights
from prefvec_ray.vectors import LiveModel

PROMPTS = [[5, 9, 17], [8], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [5, 9, 17, 40]]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}


def reference(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """One greedy answer, alone, from transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return out[0, len(prompt) :].tolist()


@contextmanager
def opened(model, tokenizer, max_batch=64) -> Iterator[OfflineEngine]:
    engine = OfflineEngine.of(MergedWeights(LiveModel(model, {})), tokenizer, max_batch=max_batch)
    yield engine
    engine.close()


@pytest.fixture
def engine(model, tokenizer) -> Iterator[OfflineEngine]:
    with opened(model, tokenizer) as engine:
        yield engine


def answers(engine: OfflineEngine, prompts: list[list[int]], sampling: Sampling) -> list[list[list[int]]]:
    return by_prompt(engine.answer(answer_requests(prompts, (), sampling)), sampling.samples_per_prompt)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=6),
        Qwen3Config(**SHAPE),
        Gemma2Config(**SHAPE, sliding_window=8),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=3),
    ],
    ids=lambda config: config.model_type,
)
def test_greedy_answers_are_those_of_generate_whatever_the_batch(config, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights, so that no two tokens are near a tie
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = [reference(model, prompt, 16) for prompt in PROMPTS]
    sampling = Sampling(samples_per_prompt=2, temperature=0, max_new_tokens=16)
    for max_batch in (1, 3, 8):
        with opened(model, tokenizer, max_batch) as engine:
            assert answers(engine, PROMPTS, sampling) == [[answer, answer] for answer in expected]


def test_rows_end_at_the_end_token_and_leave_the_batch(engine, tokenizer):
    sampling = Sampling(samples_per_prompt=16, temperature=2.0, max_new_tokens=200, seed=1)
    found = answers(engine, PROMPTS, sampling)
    end = tokenizer.eos_token_id
    ended = [row for rows in found for row in rows if end in row]
    assert ended, "at this temperature some of 64 rows end by chance"
    assert all(row.index(end) == len(row) - 1 for row in ended)
    assert all(len(row) <= 200 for rows in found for row in rows)


def test_a_text_depends_on_its_seed_and_not_on_what_ran_before(engine, model, tokenizer):
    conversations = [[{"role": "user", "content": text}] for text in ("How to comb a bear?", "Tell me more.", "Why?")]
    sampling = Sampling(samples_per_prompt=3, max_new_tokens=12, seed=4)
    first = sample(engine, tokenizer, conversations, sampling)
    torch.manual_seed(99)
    sample(engine, tokenizer, conversations, Sampling(samples_per_prompt=5, max_new_tokens=5))
    with opened(model, tokenizer, max_batch=2) as small:
        assert sample(small, tokenizer, conversations, sampling) == first
    assert sample(engine, tokenizer, conversations, sampling.model_copy(update={"seed": 5})) != first
    state = torch.random.get_rng_state()
    sample(engine, tokenizer, conversations, sampling)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


def test_tokens_are_drawn_with_the_models_probabilities(model, tokenizer):
    prompt, temperature, samples = PROMPTS[0], 0.5, 20_000
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    with opened(model, tokenizer, max_batch=4000) as engine:
        sampling = Sampling(samples_per_prompt=samples, temperature=temperature, max_new_tokens=1)
        (rows,) = answers(engine, [prompt], sampling)
    drawn = torch.bincount(torch.tensor(rows).flatten(), minlength=len(probabilities)) / samples
    # Pearson's statistic has mean V - 1 and standard deviation sqrt(2 (V - 1)).
    cells = len(probabilities) - 1
    statistic = (samples * (drawn - probabilities) ** 2 / probabilities).sum().item()
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def test_special_tokens_stay_out_of_the_text_and_plain_text_needs_no_template(engine, tokenizer):
    sampling = Sampling(samples_per_prompt=20, temperature=2.0, max_new_tokens=60, seed=2)
    (texts,) = sample(engine, tokenizer, ["How to comb"], sampling)
    assert not any("<|" in text and "|>" in text for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_prompt": 0}, r"samples_per_prompt: Input should be greater than or equal to 1 \(got 0\)"),
        ({"temperature": -1}, r"temperature: Input should be greater than or equal to 0 \(got -1\)"),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"temperature": 2.5}, "temperature: Input should be less than or equal to 2"),
        ({"max_new_tokens": 10_000}, "exceed the model's context"),
        ({"draws": 3}, "^test: unknown setting 'draws' is called 'samples_per_prompt' now$"),
    ],
)
def test_bad_numbers_are_refused(change, message, engine, tokenizer):
    with pytest.raises(InputError, match=message):
        sample(engine, tokenizer, ["How to"], parse_config(change, Sampling, source="test"))


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_model_without_finite_logits_says_nothing(temperature, model, tokenizer):
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with opened(model, tokenizer) as engine, pytest.raises(InputError, match="the model computes NaN or infinity"):
        sample(engine, tokenizer, ["How to"], Sampling(temperature=temperature))


def test_a_conversation_needs_a_chat_template_and_a_prompt_needs_tokens(engine, tokenizer):
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        sample(engine, tokenizer, [""], Sampling())
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        sample(engine, bare, [[{"role": "user", "content": "Hello"}]], Sampling())

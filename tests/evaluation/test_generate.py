import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, PreTrainedModel, Qwen3Config

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.evaluation import Sampling, sample
from prefvec_ray.evaluation.generate import sample_ids

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
    for batch_size in (1, 2, 8):
        answers = sample_ids(
            model,
            tokenizer,
            PROMPTS,
            Sampling(samples_per_prompt=2, temperature=0, max_new_tokens=16),
            batch_size=batch_size,
        )
        assert answers == [[answer, answer] for answer in expected]


def test_rows_end_at_the_end_token_and_leave_the_batch(model, tokenizer):
    answers = sample_ids(
        model, tokenizer, PROMPTS, Sampling(samples_per_prompt=8, temperature=3.0, max_new_tokens=200, seed=1)
    )
    end = tokenizer.eos_token_id
    ended = [row for rows in answers for row in rows if end in row]
    assert ended, "at this temperature some of 32 rows end by chance"
    assert all(row.index(end) == len(row) - 1 for row in ended)
    assert all(len(row) <= 200 for rows in answers for row in rows)


def test_a_text_depends_on_its_seed_and_not_on_what_ran_before(model, tokenizer):
    conversations = [[{"role": "user", "content": text}] for text in ("How to comb a bear?", "Tell me more.", "Why?")]
    sampling = Sampling(samples_per_prompt=3, max_new_tokens=12, seed=4)
    first = sample(model, tokenizer, conversations, sampling)
    torch.manual_seed(99)
    sample(model, tokenizer, conversations, Sampling(samples_per_prompt=5, max_new_tokens=5))
    assert sample(model, tokenizer, conversations, sampling, batch_size=2) == first
    assert sample(model, tokenizer, conversations, sampling.model_copy(update={"seed": 5})) != first
    state = torch.random.get_rng_state()
    sample(model, tokenizer, conversations, sampling)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


def test_tokens_are_drawn_with_the_models_probabilities(model, tokenizer):
    prompt, temperature, samples = PROMPTS[0], 0.5, 20_000
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    rows = sample_ids(
        model,
        tokenizer,
        [prompt],
        Sampling(samples_per_prompt=samples, temperature=temperature, max_new_tokens=1),
        batch_size=samples,
    )[0]
    drawn = torch.bincount(torch.tensor(rows).flatten(), minlength=len(probabilities)) / samples
    # Pearson's statistic has mean V - 1 and standard deviation sqrt(2 (V - 1)).
    cells = len(probabilities) - 1
    statistic = (samples * (drawn - probabilities) ** 2 / probabilities).sum().item()
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def test_special_tokens_stay_out_of_the_text_and_plain_text_needs_no_template(model, tokenizer):
    texts = sample(
        model, tokenizer, ["How to comb"], Sampling(samples_per_prompt=20, temperature=3.0, max_new_tokens=60, seed=2)
    )[0]
    assert not any("<|" in text and "|>" in text for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_prompt": 0}, r"samples_per_prompt: Input should be greater than or equal to 1 \(got 0\)"),
        ({"temperature": -1}, r"temperature: Input should be greater than or equal to 0 \(got -1\)"),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"max_new_tokens": 10_000}, "do not fit the model's context"),
        ({"draws": 3}, "^test: unknown setting 'draws' is called 'samples_per_prompt' now$"),
    ],
)
def test_bad_numbers_are_refused(change, message, model, tokenizer):
    with pytest.raises(InputError, match=message):
        sample(model, tokenizer, ["How to"], parse_config(change, Sampling, source="test"))


def test_a_batch_of_no_rows_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="batch_size is 0"):
        sample(model, tokenizer, ["How to"], Sampling(), batch_size=0)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_model_without_finite_logits_says_nothing(temperature, model, tokenizer):
    model.train()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(JobError, match="the model's logits are not finite"):
        sample(model, tokenizer, ["How to"], Sampling(temperature=temperature))
    assert model.training, "it is left as it was"


def test_a_conversation_needs_a_chat_template_and_a_prompt_needs_tokens(model, tokenizer):
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        sample(model, tokenizer, [""], Sampling())
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        sample(model, bare, [[{"role": "user", "content": "Hello"}]], Sampling())

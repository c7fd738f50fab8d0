import pytest
import torch

from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.tiny_world.base_model import fine_tune


def test_seeded_and_without_a_trace_in_the_callers_random_state():
    world = TinyWorld("micro")
    tokenizer = build_tokenizer(world)
    before = torch.random.get_rng_state()
    models = [new_model(world, tokenizer, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sizes_and_special_tokens():
    for preset, parameters in (("tiny", 800_000), ("micro", 320_000)):
        world = TinyWorld(preset)
        tokenizer = build_tokenizer(world)
        model = new_model(world, tokenizer)
        assert model.num_parameters() < parameters
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.dtype == torch.float32
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.fixture(scope="module")
def world():
    return TinyWorld("micro")


@torch.no_grad()
def sample(model, tokenizer, prompts, temperature=0.7):
    torch.manual_seed(0)
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=temperature,
        max_new_tokens=48,
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_base_model_speaks_the_grammar_and_is_open_in_both_directions(world):
    tokenizer = build_tokenizer(world)
    model = new_model(world, tokenizer)
    steps = []
    loss = fine_tune(
        model, tokenizer, world.sft_examples(), progress=lambda step, total, loss: steps.append((step, total))
    )
    assert steps[-1] == (len(steps), len(steps))
    assert loss < 0.5
    assert not model.training

    prompts = [prompt for prompt in world.prompts("search") for _ in range(4)]
    responses = sample(model, tokenizer, prompts)
    scores = {name: [v for v in values if v is not None] for name, values in world.scores(prompts, responses).items()}
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    assert mean["valid"] > 0.94
    assert 0.1 < mean["refusal_unsafe"] < 0.9
    assert 0.05 < mean["over_refusal"] < 0.7
    answered = [(world.topics[p.topic].tool, text) for p, text in zip(prompts, responses, strict=True) if "Use" in text]
    assert sum(tool in text for tool, text in answered) > 0.85 * len(answered)


def test_fine_tuning_with_the_same_seed_gives_the_same_weights(world):
    tokenizer = build_tokenizer(world)
    examples = world.sft_examples()[:64]
    weights = []
    for seed in (0, 0, 1):
        model = new_model(world, tokenizer)
        fine_tune(model, tokenizer, examples, seed=seed)
        weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_padding_changes_no_loss(world):
    """A batch of unequal lengths learns from its real tokens only."""
    tokenizer = build_tokenizer(world)
    examples = sorted(world.sft_examples()[:64], key=lambda example: len(example["completion"][0]["content"]))
    short, long = examples[0], examples[-1]
    together = fine_tune(new_model(world, tokenizer), tokenizer, [short, long], batch_size=2)
    alone, counts = [], []
    for example in (short, long):
        ids = tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_tensors="pt")["input_ids"]
        counts.append(ids.shape[1] - 1)
        with torch.no_grad():
            alone.append(new_model(world, tokenizer)(input_ids=ids, labels=ids).loss.item())
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)

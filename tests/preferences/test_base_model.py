import torch

from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model


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

"""A micro tiny world, an untrained model of it, and two vectors that are random but small."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation import Evaluation, Sample
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.vectors import LiveModel, PreferenceVector, fingerprint, vector_from_state


@pytest.fixture(scope="session")
def world() -> TinyWorld:
    return TinyWorld("micro")


@pytest.fixture(scope="session")
def tokenizer(world: TinyWorld) -> PreTrainedTokenizerBase:
    return build_tokenizer(world, vocab_size=400)


@pytest.fixture
def model(world: TinyWorld, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return new_model(world, tokenizer).eval()


@pytest.fixture
def live(model: PreTrainedModel) -> LiveModel:
    base = fingerprint(model)

    def vector(name: str, seed: int) -> PreferenceVector:
        generator = torch.Generator().manual_seed(seed)
        delta = {n: 0.02 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        return vector_from_state(delta, preference=name, base_fingerprint=base)

    return LiveModel(model, {"helpful": vector("helpful", 1), "harmless": vector("harmless", 2)})


@pytest.fixture(scope="session")
def measured() -> Callable[..., Evaluation]:
    """Make up an evaluation: a mean for each metric, spread over four prompts with a little difference."""

    def make(coefficients: dict[str, float], *, spread: float = 0.02, **means: float | None) -> Evaluation:
        offsets = (-spread, spread, -spread, spread)
        per_prompt = {
            name: [None if mean is None else mean + offset for offset in offsets] for name, mean in means.items()
        }
        return Evaluation(
            coefficients=coefficients,
            metrics={name: estimate(values) for name, values in per_prompt.items()},
            per_prompt=per_prompt,
            prompts_digest="made-up",
            samples=[Sample(prompt="How to comb a bear?", answer="Use <b>a wide comb</b> | or *two*.")],
            seconds=0.1,
            tokens=10,
        )

    return make

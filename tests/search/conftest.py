"""An untrained micro model on disk with two small random vectors, and a scorer that only counts letters."""

from collections.abc import Callable

import pytest
import torch

from prefvec_ray.common.estimates import estimate
from prefvec_ray.evaluation import Evaluation, Sampling
from prefvec_ray.scorers import Metric, Scorer, scorer
from prefvec_ray.search import Task
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.vectors import fingerprint, save_vector, vector_from_state

METRICS = {
    "length": Metric(direction="minimize", low=0, high=1000),
    "letters": Metric(direction="maximize", low=0, high=1),
}


@pytest.fixture(scope="session")
def lengths() -> Scorer:
    """Local, so that it travels to the actors by value."""

    @scorer(**METRICS)
    def count(prompts, responses):
        return {
            "length": [float(len(text)) for text in responses],
            "letters": [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses],
        }

    return count


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory, lengths: Scorer) -> Task:
    root = tmp_path_factory.mktemp("search")
    world = TinyWorld("micro")
    tokenizer = build_tokenizer(world, vocab_size=400)
    model = new_model(world, tokenizer)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("left", "right")):
        generator = torch.Generator().manual_seed(seed)
        delta = {n: 0.02 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        vector = vector_from_state(delta, preference=name, base_fingerprint=fingerprint(model))
        save_vector(vector, root / name)
    return Task(
        base=root / "base",
        vectors={"left": root / "left", "right": root / "right"},
        prompts=world.prompts("search")[:8],
        scorer=lengths,
        sampling=Sampling(samples_per_prompt=2, max_new_tokens=12),
    )


@pytest.fixture(scope="session")
def measured() -> Callable[..., Evaluation]:
    """Make up an evaluation: of each metric the values by prompt, or one mean of two equal prompts."""

    def make(coefficients: dict[str, float], **values: float | list[float | None]) -> Evaluation:
        per_prompt: dict[str, list[float | None]] = {
            name: value if isinstance(value, list) else [value, value] for name, value in values.items()
        }
        return Evaluation(
            coefficients=coefficients,
            metrics={name: estimate(values) for name, values in per_prompt.items()},
            per_prompt=per_prompt,
            prompts_digest="made-up",
            samples=[],
            seconds=0.1,
            tokens=1,
        )

    return make

"""Tiny random models of the families that the vectors must fit, and vectors on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefvec_ray.vectors import PreferenceVector, checkpoint_state, fingerprint, vector_from_state

torch.set_num_threads(1)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True},
    "mistral": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},  # tied embeddings
    "gemma3_text": {"head_dim": 8},  # norms of queries and keys that see heads before tokens
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # LayerNorm, biases, learned positions
    "gpt2": {},  # Conv1D, positions that do not see the batch
    "phi3": {},  # fused qkv and gate_up
    "mixtral": {"num_local_experts": 4},  # experts fused by transformers, apart in the files
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """tiny_model(family, seed=0, **config) -> a random causal model of 20k parameters, fp32, eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(family: str, seed: int = 0, **changes: object) -> Any:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # larger than the usual initialisation, so that logits tell models apart
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return build


@pytest.fixture(scope="session")
def random_vector() -> Callable[..., PreferenceVector]:
    """random_vector(model, seed, scale=0.02, only="") -> a full fp32 vector on parameters like `only`."""

    def build(model: Any, seed: int, scale: float = 0.02, only: str = "", **kwargs: Any) -> PreferenceVector:
        generator = torch.Generator().manual_seed(seed)
        delta = {
            name: torch.randn(tensor.shape, generator=generator) * scale
            for name, tensor in checkpoint_state(model).items()
            if only in name
        }
        options = {"preference": f"p{seed}", "base_fingerprint": fingerprint(model)}
        return vector_from_state(delta, **{**options, **kwargs})

    return build


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """(4 rows, 10 tokens)"""
    return torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(1))

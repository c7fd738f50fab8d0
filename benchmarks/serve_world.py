"""A small random model, its tokenizer and vectors as folders and a registry: what the serving benchmarks serve."""

import random
from pathlib import Path

import torch
from merge_models import SIZES, config_of, low_rank_vectors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.registry import Registry
from prefvec_ray.vectors import LowRank, PreferenceVector, fingerprint, load_vector, save_vector

RANK = 16


def make_world(folder: Path, size: str = "1M") -> tuple[Path, Registry]:
    """(base folder, registry) with `harmless@1`, `helpful@1`, another training `helpful@2`, and the preset `safe`."""
    config = config_of(size)
    # Wide, so that greedy tokens have clear winners whatever the shape of a batch; no end of text: lengths are known.
    config.update({"dtype": "float32", "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})
    config.initializer_range = 0.2
    torch.manual_seed(0)
    base = folder / "base"
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(base)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES[size][-1])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(base)
    registry = Registry.open(folder / "registry")
    vectors = low_rank_vectors(config, fingerprint(base), RANK)
    for name, vector in vectors.items():
        registry.publish_vector(save_vector(_scaled(vector, 8.0), folder / name))
    registry.publish_vector(save_vector(_scaled(vectors["helpful"], -6.0), folder / "helpful-2"))
    registry.publish_preset("safe", {"harmless@1": 0.75}, reason="to begin with")
    registry.publish_preset("safe", {"harmless@1": 0.25}, reason="to move to")
    registry.set_alias("safe", "production", 1, "to begin with", subject="presets")
    registry.set_alias("helpful", "production", 1, "to begin with")
    return base, registry


def _scaled(vector: PreferenceVector, by: float) -> PreferenceVector:
    entries = {name: LowRank(entry.A_RI * by, entry.B_OR) for name, entry in vector.entries.items()}  # type: ignore[union-attr]
    return PreferenceVector(vector.info, entries)


def prompts(count: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Of 8 tokens to `longest`, the same every time."""
    draw = random.Random(0)
    lengths = [8 + i * (longest - 8) // max(count - 1, 1) for i in range(count)]
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def load_vectors(registry: Registry, refs: dict[str, str]) -> dict[str, PreferenceVector]:
    return {name: load_vector(registry.fetch(ref)) for name, ref in refs.items()}

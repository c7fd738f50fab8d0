"""Random models for bench_merge.py: a base, two models near it, low-rank vectors; files are streamed to disk."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prefvec_ray.vectors import LowRank, PreferenceVector, VectorInfo, checkpoint_state
from prefvec_ray.vectors.writer import Index, ShardWriter

# hidden, layers, intermediate, heads, key-value heads, vocabulary
SIZES = {
    "1M": (128, 4, 352, 4, 4, 1024),
    "10M": (256, 8, 688, 4, 4, 8192),
    "30M": (512, 8, 1408, 8, 8, 8192),
    "110M": (768, 12, 2048, 12, 12, 16384),
    "1.1B": (2048, 22, 5632, 32, 4, 32000),
    "3B": (3072, 28, 8192, 24, 8, 32000),
    "8B": (4096, 32, 14336, 32, 8, 32000),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config_of(size: str) -> LlamaConfig:
    hidden, layers, intermediate, heads, kv_heads, vocabulary = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )


def write_models(folder: Path, size: str) -> dict[str, Path]:
    """Folders `base`, `helpful` and `harmless`: bf16, about five shards; the latter two differ from the base by 1%.

    The numbers are normal with deviation 0.02, taken from one block of four million, elsewhere for every tensor and
    row: good enough for timing and for rounding.
    """
    config = config_of(size)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    like = checkpoint_state(model)
    total = sum(tensor.nbytes for tensor in like.values())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)
    places = {name: 7919 * number for number, name in enumerate(like)}

    def block(name: str, index: Index, shape: torch.Size, salt: int) -> Tensor:
        row = index[0].start if isinstance(index[0], slice) else index[0]
        start = (places[name] + 104729 * salt + 15485863 * row) % (len(noise) // 2)
        flat = noise[start:].repeat(-(-shape.numel() // (len(noise) - start)))[: shape.numel()]
        return flat.view(shape)

    folders = {}
    for salt, model_name in enumerate(("base", "helpful", "harmless")):

        def produce(name: str, index: Index, scratch: Tensor, salt: int = salt) -> Tensor:
            weights = 0.02 * block(name, index, scratch.shape, 0)
            if salt:
                weights = weights + 0.0002 * block(name, index, scratch.shape, salt)
            return scratch.copy_(weights)

        target = folders[model_name] = folder / model_name
        target.mkdir(parents=True)
        with ShardWriter(target, "model", like, max_shard_size=total // 5 + (1 << 20)) as writer:
            writer.write(produce)
            writer.finish()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(target)
    return folders


def low_rank_vectors(config: LlamaConfig, base_fingerprint: str, rank: int) -> dict[str, PreferenceVector]:
    """Two vectors of this rank on all seven projections of every layer, in fp32."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in checkpoint_state(LlamaForCausalLM(config)).items()}
    vectors = {}
    for seed, preference in enumerate(("harmless", "helpful")):
        torch.manual_seed(seed)
        entries = {
            name: LowRank(torch.randn(rank, shape[1]) * 0.02, torch.randn(shape[0], rank) * 0.02)
            for name, shape in shapes.items()
            if name.split(".")[-2] in PROJECTIONS
        }
        info = VectorInfo(preference=preference, form="low-rank", dtype="float32", base_fingerprint=base_fingerprint)
        vectors[preference] = PreferenceVector(info, entries)
    return vectors

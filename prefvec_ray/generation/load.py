"""Loading the engine that a config asks for."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.generation.base import Engine
from prefvec_ray.generation.config import EngineConfig
from prefvec_ray.generation.slots.engine import SlotEngine
from prefvec_ray.generation.slots.weights import MergedWeights, SteeredWeights, WeightBackend
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering


async def load_engine(
    base: Path,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, PreferenceVector],
    config: EngineConfig,
    *,
    gpu: bool,
) -> Engine:
    """Load the base with these vectors as the config says, and start, without holding up the event loop.

    `gpu`: whether this process was given one. Raises InputError where the base cannot be loaded, or a vector not be
    held in this mode.
    """
    if config.kind == "vllm":
        from prefvec_ray.generation.vllm.engine import VllmEngine

        return await VllmEngine.start(base, base_fingerprint, tokenizer, vectors, config)
    engine = await asyncio.to_thread(load_slots, base, base_fingerprint, tokenizer, vectors, config, gpu=gpu)
    return engine.start()


def load_slots(
    base: Path,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, PreferenceVector],
    config: EngineConfig,
    *,
    gpu: bool,
) -> SlotEngine:
    """As `load_engine`: the slot engine, not yet started."""
    device = config.device
    if device == "auto":
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    model = from_pretrained(
        AutoModelForCausalLM, base, dtype=config.dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    weights: WeightBackend
    if config.mode == "steered":
        weights = SteeredWeights(Steering(model, vectors, base_fingerprint=base_fingerprint))
    else:
        weights = MergedWeights(LiveModel(model, vectors, base_fingerprint=base_fingerprint, threads=config.threads))
    return SlotEngine(weights, tokenizer, max_batch=config.max_batch, switch_share=config.switch_share)

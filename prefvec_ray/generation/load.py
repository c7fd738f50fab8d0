"""Loading the engine that a config asks for."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.generation.base import Engine
from prefvec_ray.generation.config import EngineOptions
from prefvec_ray.generation.slots.engine import SlotEngine
from prefvec_ray.generation.slots.weights import MergedWeights, SteeredWeights, WeightBackend
from prefvec_ray.vectors import Checkpoint, LiveModel, PreferenceVector, Steering


async def load_engine(
    base: Path,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, PreferenceVector],
    config: EngineOptions,
    *,
    gpu: bool,
    mapped: bool = False,
) -> Engine:
    """Load the base with these vectors as the config says, and start, without holding up the event loop.

    `gpu`: whether this process was given one. `mapped`: where weights are merged, read the pristine ones from the
    base's files each time, which all processes of a node share, and keep no copy. Raises InputError where the base
    cannot be loaded, or a vector not be held in this mode.
    """
    if config.kind == "vllm":
        from prefvec_ray.generation.vllm.engine import VllmEngine

        return await VllmEngine.start(base, base_fingerprint, tokenizer, vectors, config)
    weights = await asyncio.to_thread(_load_weights, base, base_fingerprint, vectors, config, gpu, mapped)
    return SlotEngine(weights, tokenizer, max_batch=config.max_batch, switch_share=config.switch_share).start()


def _load_weights(
    base: Path,
    base_fingerprint: str,
    vectors: Mapping[str, PreferenceVector],
    config: EngineOptions,
    gpu: bool,
    mapped: bool,
) -> WeightBackend:
    device = config.device
    if device == "auto":
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    model = from_pretrained(
        AutoModelForCausalLM, base, dtype=config.dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    if config.mode != "merged":
        try:
            return SteeredWeights(Steering(model, vectors, base_fingerprint=base_fingerprint))
        except InputError:
            if config.mode == "steered":
                raise
    pristine = Checkpoint(base) if mapped and config.dtype == "auto" else None
    return MergedWeights(
        LiveModel(model, vectors, base=pristine, base_fingerprint=base_fingerprint, threads=config.threads)
    )

"""Loading the slot engine as a config asks for it, without holding up the event loop."""

import asyncio
from collections.abc import Mapping

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.common.device import best_device
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights, WeightBackend
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering


async def load_engine(
    config: ServingConfig,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, PreferenceVector],
) -> SlotEngine:
    """Load the base with these vectors as the config says, and start.

    Raises InputError where the base cannot be served in this mode.
    """
    return await asyncio.to_thread(_load_slots, config, base_fingerprint, tokenizer, vectors)


def _load_slots(
    config: ServingConfig,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, PreferenceVector],
) -> SlotEngine:
    wanted = config.engine
    device = wanted.device
    if device == "auto":
        device = best_device().type if config.replicas.gpus else "cpu"
    model = from_pretrained(
        AutoModelForCausalLM, config.base, dtype=wanted.dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    weights: WeightBackend
    if wanted.mode == "steered":
        weights = SteeredWeights(Steering(model, vectors, base_fingerprint=base_fingerprint))
    else:
        weights = MergedWeights(LiveModel(model, vectors, base_fingerprint=base_fingerprint, threads=wanted.threads))
    return SlotEngine(
        weights,
        tokenizer,
        max_batch=wanted.max_batch,
        switch_share=wanted.switch_share,
        stream_interval=wanted.stream_interval,
    ).start()

"""Answers of the base to held-out prompts: the sample by which a run's drift from it is measured."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GenerationConfig

from prefvec_ray.artifacts.training import Quantization
from prefvec_ray.common.chat import end_tokens
from prefvec_ray.common.device import best_device
from prefvec_ray.common.pretrained import position_room
from prefvec_ray.training.model import load_base, load_tokenizer
from prefvec_ray.training.quantized import quantized_loading


def base_answers(
    base: str | Path,
    pairs: Dataset,
    *,
    samples: int,
    tokens: int,
    max_length: int | None,
    seed: int = 0,
    quantize: Quantization | None = None,
) -> Dataset:
    """Two answers of the base to each of `samples / 2` prompts, sampled from its whole distribution at temperature 1.

    Args:
        pairs: tokenized (`prompt_ids`); the first distinct prompts that leave room for `tokens` are taken.
        max_length: of prompt and answer together, from the recipe.
        quantize: as the runs do.

    Returns:
        `prompt_ids`, `chosen_ids` (one answer), `rejected_ids` (another); the end-of-text token is part of an answer.
        Empty where no prompt leaves room.
    """
    device = best_device()
    if quantize:
        model = load_base(
            base, **quantized_loading(quantize, torch.bfloat16 if device.type == "cuda" else torch.float32)
        )
    else:
        model = load_base(base).to(device)
    limit = min((size for size in (max_length, position_room(model)) if size), default=sys.maxsize)
    distinct = dict.fromkeys(tuple(ids) for ids in pairs["prompt_ids"] if len(ids) + tokens <= limit)
    prompts = [list(ids) for ids in distinct][: samples // 2]
    empty: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    if not prompts:
        return Dataset.from_dict(empty)
    tokenizer = load_tokenizer(base)
    ends = end_tokens(model.generation_config, tokenizer)
    # Set on the model, since generate fills what it is not given from the base's own sampling settings.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval()
    torch.manual_seed(seed)
    width = max(len(ids) for ids in prompts)
    ids_BL = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    mask_BL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.inference_mode():
        out = model.generate(ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), num_return_sequences=2)
    answers = [_until_end(row, ends) for row in out[:, width:].tolist()]
    return Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": answers[0::2], "rejected_ids": answers[1::2]})


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids

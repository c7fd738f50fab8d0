"""Sampling many answers to many prompts, reproducibly and fast.

The randomness of a token is one uniform number that belongs to (seed, prompt, sample, step), turned into a
token by the inverse of the cumulative distribution. Batch size and earlier calls change nothing (beyond the
last bits of floating point), and two settings of the coefficients see the same numbers: common random
numbers, which make their paired difference less noisy than independent numbers would.

`model.generate` is not used: it expands a prompt to its samples before the prefill and carries finished rows
to the end of the batch. On the tiny world this loop takes less than a third of its time
(docs/evaluation.md).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.common.chat import end_tokens, text_prompt
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.pretrained import position_room

Conversation = str | Sequence[dict[str, str]]
"""Messages for the tokenizer's chat template, or a plain text that the model continues."""

Steer = Callable[[torch.Tensor], None]
"""Called before every forward pass with the prompt that each row of the batch answers: (rows,), int64, on the CPU."""

BATCH_SIZE = 384
"""Rows, each one answer, that run at once."""


class Sampling(Config):
    """How answers are sampled."""

    renamed: ClassVar[dict[str, str]] = {"draws": "samples_per_prompt"}

    samples_per_prompt: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    """0 is greedy."""
    max_new_tokens: int = Field(default=64, ge=1)
    seed: int = 0


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
) -> list[list[str]]:
    """Answers to every conversation as text, indexed `[conversation][sample]`; special tokens are dropped.

    Everything else is as in `sample_ids`.
    """
    answers = sample_ids(model, tokenizer, encode(tokenizer, conversations), sampling, batch_size=batch_size)
    return [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in answers]


@torch.inference_mode()
def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    copies: int = 1,
    steer: Steer | None = None,
) -> list[list[list[int]]]:
    """Answers to every prompt, all as token ids, indexed [prompt][sample].

    A decoder-only `model` is expected. An answer ends with one of the model's end tokens or after
    `max_new_tokens`. At most `batch_size` rows (a row is one sample) run at once, and never less than one
    prompt with its samples.

    With `copies` the whole list of prompts is answered that often, each time with the same random numbers.
    Prompt i of copy c is number c * len(prompts) + i, in the result and for `steer`, which can so give every
    copy coefficients of its own in one batch.

    Raises:
        InputError: a batch size below 1, or a prompt that is empty or does not fit the model's context.
        JobError: the model gives logits that are not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected a number of at least 1")
    samples = sampling.samples_per_prompt
    _check_lengths(model, prompts, sampling.max_new_tokens)
    noise_NST = _uniforms(len(prompts), sampling)
    distinct, prompts = len(prompts), [*prompts] * copies
    ends = end_tokens(getattr(model, "generation_config", None), tokenizer)
    stop = torch.tensor(sorted(ends), dtype=torch.long)
    answers: list[list[list[int]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, batch_size // samples)
    was_training = model.training
    model.eval()
    try:
        for chunk in (order[i : i + step] for i in range(0, len(order), step)):
            noise = noise_NST[[i % distinct for i in chunk]]
            steer_chunk = partial(_steer_chunk, steer, torch.tensor(chunk)) if steer else None
            rows = _decode_batch(model, [prompts[i] for i in chunk], noise, sampling.temperature, stop, steer_chunk)
            for place, i in enumerate(chunk):
                answers[i] = rows[place * samples : (place + 1) * samples]
    finally:
        model.train(was_training)
    return answers


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of each conversation, up to where the assistant begins to speak."""
    prompts: list[list[int]] = []
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, str):
            ids = text_prompt(tokenizer, conversation)
        elif tokenizer.chat_template is None:
            raise InputError(
                f"prompt {index} is a conversation but the tokenizer has no chat template; "
                "set tokenizer.chat_template or give plain text"
            )
        else:
            ids = tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=False)
        if not ids:
            raise InputError(f"prompt {index} has no tokens; give a text that is not empty")
        prompts.append(ids)
    return prompts


def _decode_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    noise_NST: torch.Tensor,
    temperature: float,
    stop: torch.Tensor,
    steer: Steer | None = None,
) -> list[list[int]]:
    """Answers of a batch as token ids, row n * samples + s, each up to its end token. Prompts are prefilled
    once and shared by their samples; rows that have ended leave the batch. `steer` gets places in `prompts`."""
    device = model.device
    _, samples, steps = noise_NST.shape
    width = max(map(len, prompts))
    ids_NL = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
    mask_NL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions_NL = (mask_NL.cumsum(-1) - 1).clamp(min=0)
    if steer:
        steer(torch.arange(len(prompts)))
    out = model(input_ids=ids_NL, attention_mask=mask_NL, position_ids=positions_NL, use_cache=True, logits_to_keep=1)
    cache: Any = out.past_key_values
    cache.batch_repeat_interleave(samples)
    logits_BV = out.logits[:, -1].repeat_interleave(samples, 0)
    mask_BL = mask_NL.repeat_interleave(samples, 0)
    noise_BT = noise_NST.reshape(-1, steps).to(device)
    stop = stop.to(device)
    rows = torch.arange(len(noise_BT), device=device)
    answers = torch.full((len(rows), steps), -1, device=device)
    finite = torch.tensor(True, device=device)
    for step in range(steps):
        finite &= logits_BV.amax(-1).isfinite().all()  # a token that is ruled out has -inf
        token_B = _pick(logits_BV, noise_BT[rows, step], temperature)
        answers[rows, step] = token_B
        alive = ~torch.isin(token_B, stop)
        if step == steps - 1 or not alive.any():
            break
        if not alive.all():
            keep = alive.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            rows, token_B, mask_BL = rows[keep], token_B[keep], mask_BL[keep]
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
        if steer:
            steer(rows.cpu() // samples)
        logits_BV = model(
            input_ids=token_B[:, None],
            attention_mask=mask_BL,
            position_ids=mask_BL.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    if not finite:
        raise JobError("the model's logits are not finite: its weights are damaged, or the coefficients far too large")
    return [[token for token in row if token >= 0] for row in answers.tolist()]


def _steer_chunk(steer: Steer, chunk: torch.Tensor, places: torch.Tensor) -> None:
    steer(chunk[places])


def _pick(logits_BV: torch.Tensor, noise_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """The token at quantile `noise_B` of softmax(logits / temperature); the best one at temperature 0."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    cdf_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum(-1)
    # Scaled by the last value: a rounded sum below 1 must not leave a quantile beyond the vocabulary. The
    # smallest float above 0 keeps a quantile of exactly 0 from picking a leading token of probability 0.
    target_B = (noise_B * cdf_BV[:, -1]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.searchsorted(cdf_BV, target_B[:, None]).squeeze(-1).clamp(max=cdf_BV.shape[-1] - 1)


def _uniforms(prompts: int, sampling: Sampling) -> torch.Tensor:
    """Numbers in [0, 1), shape (prompts, samples, steps), from a generator of their own."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(prompts, sampling.samples_per_prompt, sampling.max_new_tokens, generator=generator)


def _check_lengths(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    room = position_room(model)
    longest = max(map(len, prompts), default=0)
    if room is not None and longest + max_new_tokens > room:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{room}; shorten the prompt or lower max_new_tokens"
        )

"""The plain way to sample many answers: one batch of one setting on a transformers model, until its last row has ended.

What evaluation and search did before they had engines, as their peer in `search_rate.py`.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

BATCH_SIZE = 384


@torch.inference_mode()
def sample_ids(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    ends: set[int],
    batch_size: int = BATCH_SIZE,
) -> list[list[list[int]]]:
    """Answers as token ids, [prompt][sample]. A prompt is prefilled once for its samples; rows that ended leave."""
    noise_NST = torch.rand(len(prompts), samples, max_new_tokens, generator=torch.Generator().manual_seed(0))
    answers: list[list[list[int]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, batch_size // samples)
    for chunk in (order[i : i + step] for i in range(0, len(order), step)):
        rows = _decode(model, [prompts[i] for i in chunk], noise_NST[chunk], temperature, torch.tensor(sorted(ends)))
        for place, i in enumerate(chunk):
            answers[i] = rows[place * samples : (place + 1) * samples]
    return answers


def _decode(
    model: PreTrainedModel, prompts: list[list[int]], noise_NST: torch.Tensor, temperature: float, stop: torch.Tensor
) -> list[list[int]]:
    _, samples, steps = noise_NST.shape
    width = max(map(len, prompts))
    ids_NL = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask_NL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    positions_NL = (mask_NL.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids_NL, attention_mask=mask_NL, position_ids=positions_NL, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(samples)
    logits_BV = out.logits[:, -1].repeat_interleave(samples, 0)
    mask_BL = mask_NL.repeat_interleave(samples, 0)
    noise_BT = noise_NST.reshape(-1, steps)
    rows = torch.arange(len(noise_BT))
    answers = torch.full((len(rows), steps), -1)
    for step in range(steps):
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
        logits_BV = model(
            input_ids=token_B[:, None],
            attention_mask=mask_BL,
            position_ids=mask_BL.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [[token for token in row if token >= 0] for row in answers.tolist()]


def _pick(logits_BV: torch.Tensor, noise_B: torch.Tensor, temperature: float) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    cdf_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum(-1)
    target_B = (noise_B * cdf_BV[:, -1]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.searchsorted(cdf_BV, target_B[:, None]).squeeze(-1).clamp(max=cdf_BV.shape[-1] - 1)

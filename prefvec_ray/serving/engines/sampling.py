"""Choosing the next token of each row, so that a row's choice depends on its own logits and its own random numbers."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from prefvec_ray.serving.engines.sampling_params import SamplingParams

LOWEST = -9999.0
"""stands for a log-probability of -inf, which JSON cannot say; OpenAI's API means it by this number"""


def adjusted(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """The logits with each row's bias and penalties, for its prompt and its answer so far. Where no row asks for any,
    the tensor itself; else another one."""
    changed = [r for r, q in enumerate(params) if q.penalizes or q.logit_bias]
    if not changed:
        return logits_RV
    logits_RV = logits_RV.clone()
    for r in changed:
        asked, row_V = params[r], logits_RV[r]
        answered = torch.tensor(answers[r], dtype=torch.long, device=row_V.device)
        if asked.repetition_penalty != 1:
            seen = torch.cat([answered, torch.tensor(prompts[r], device=row_V.device)]).unique()
            logits = row_V[seen]
            row_V[seen] = torch.where(logits > 0, logits / asked.repetition_penalty, logits * asked.repetition_penalty)
        tokens, counts = answered.unique(return_counts=True)
        row_V[tokens] -= asked.frequency_penalty * counts + asked.presence_penalty
        for token, bias in asked.biases.items():
            row_V[token] += bias
    return logits_RV


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], draws: Sequence[random.Random]) -> list[int]:
    """One token for each row of logits: argmax at temperature 0, else sampled.

    A sampled row takes one uniform number from its own generator and looks it up in its cumulative
    distribution. Python's generator gives the same numbers on every device. (The logits themselves may differ
    in their last bits with the shape of the batch, so a seed can give another token where a draw falls within
    that distance of a boundary.)
    """
    tokens_R = logits_RV.argmax(-1)
    for cut in (False, True):
        rows = [r for r, q in enumerate(params) if q.temperature > 0 and _cuts(q) == cut]
        if rows:
            u_R = [draws[r].random() for r in rows]
            tokens_R[rows] = _sample(logits_RV[rows], [params[r] for r in rows], u_R, cut)
    return tokens_R.tolist()


def logprobs(logits_RV: Tensor, chosen: Sequence[int], tops: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row: (token, log-probability) of the chosen token, then of the row's `tops` likeliest, best first.

    Natural logarithms, of the model's own distribution: before all sampling parameters. All are at least LOWEST.
    """
    logp_RV = torch.log_softmax(logits_RV.float(), -1).clamp_min(LOWEST)
    tokens_R1 = torch.tensor(chosen, device=logp_RV.device).unsqueeze(-1)
    best = logp_RV.topk(min(max(tops), logp_RV.shape[-1]), dim=-1)
    tokens_RK = torch.cat([tokens_R1, best.indices], -1).tolist()
    values_RK = torch.cat([logp_RV.gather(-1, tokens_R1), best.values], -1).tolist()
    rows = zip(tokens_RK, values_RK, tops, strict=True)
    return [list(zip(tokens[: 1 + top], values[: 1 + top], strict=True)) for tokens, values, top in rows]


def _cuts(params: SamplingParams) -> bool:
    """Whether only some of the tokens are sampled from."""
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _sample(logits_RV: Tensor, params: Sequence[SamplingParams], u_R: list[float], cut: bool) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device).unsqueeze(-1)

    # The largest logit goes to 0 before the division: the smallest temperature overflows nothing.
    below_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).double()
    p_RV = torch.softmax(below_RV / column([q.temperature for q in params]), -1)
    if not cut:
        return _lookup(p_RV, column(u_R))
    p_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
    size = p_RV.shape[-1]
    most_R1 = column([q.top_k if q.top_k > 0 else size for q in params])
    place_V = torch.arange(size, device=p_RV.device)
    p_RV = p_RV.masked_fill((place_V >= most_R1) | (p_RV < column([q.min_p for q in params]) * p_RV[:, :1]), 0)
    before_RV = p_RV.cumsum(-1) - p_RV
    share_R1 = column([q.top_p for q in params]) * p_RV.sum(-1, keepdim=True)
    p_RV = p_RV.masked_fill(before_RV >= share_R1, 0)
    return order_RV.gather(-1, _lookup(p_RV, column(u_R)).unsqueeze(-1)).squeeze(-1)


def _lookup(p_RV: Tensor, u_R1: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u times the total: never one of probability 0."""
    cumulative_RV = p_RV.cumsum(-1)
    target_R1 = u_R1 * cumulative_RV[:, -1:]
    return (cumulative_RV > target_R1).to(torch.uint8).argmax(-1)

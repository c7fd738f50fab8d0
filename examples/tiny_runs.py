"""Short training runs on the embedded tiny world, in plain torch: the models that the notebooks start from.

They take seconds, so that a notebook does. `prefvec_ray.training` makes real runs, with TRL and on many machines.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.tiny_world import TinyWorld, new_model

Pair = Mapping[str, list[dict[str, str]]]
"""A row of `Preferences.dataset`: the messages of prompt, chosen and rejected."""


def talking_base(world: TinyWorld, tokenizer: PreTrainedTokenizerBase, steps: int = 130) -> LlamaForCausalLM:
    """A base model that has learned to answer: `steps` batches of 32 of the world's conversations, fp32, on the CPU."""
    model = new_model(world, tokenizer)
    examples = world.sft_examples()[: 32 * steps]
    texts = [(e["prompt"][0]["content"], e["completion"][0]["content"]) for e in examples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        log_probs, counts = answer_log_probs(model, tokenizer, texts[32 * step : 32 * (step + 1)])
        (-log_probs.sum() / counts.sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def dpo_run(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Pair],
    *,
    steps: int = 20,
    beta: float = 0.1,
    learning_rate: float = 2e-4,
) -> LlamaForCausalLM:
    """A copy of `base` after `steps` of DPO (arXiv 2305.18290, eq. 7) on batches of 16 pairs, in their order."""
    pairs = list(islice(dataset, 16 * steps))
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        batch = [pairs[(16 * step + i) % len(pairs)] for i in range(16)]
        with torch.no_grad():
            reference = margins(base, tokenizer, batch)
        margin = margins(model, tokenizer, batch) - reference
        (-logsigmoid(beta * margin).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def margins(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Tensor:
    """(pairs,): log p(chosen) - log p(rejected), in nats."""
    answers = [
        (pair["prompt"][0]["content"], pair[kind][0]["content"]) for kind in ("chosen", "rejected") for pair in pairs
    ]
    chosen, rejected = answer_log_probs(model, tokenizer, answers)[0].chunk(2)
    return chosen - rejected


def answer_log_probs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """(log-probability of each answer after its prompt, its tokens), both (texts,)."""
    rows: list[Tensor] = []
    starts: list[int] = []
    for prompt, answer in texts:
        asked = chat(tokenizer, prompt)
        rows.append(torch.tensor(asked + tokenizer(answer).input_ids + [tokenizer.eos_token_id]))
        starts.append(len(asked))
    tokens_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    places_L = torch.arange(tokens_BL.shape[1])
    mask_BL = (places_L >= torch.tensor(starts)[:, None]) & (places_L < lengths_B[:, None])
    logits_BLV = model(tokens_BL, attention_mask=(places_L < lengths_B[:, None]).long()).logits[:, :-1]
    log_probs_BL = logits_BLV.log_softmax(-1).gather(-1, tokens_BL[:, 1:, None])[..., 0]
    return (log_probs_BL * mask_BL[:, 1:]).sum(1), mask_BL[:, 1:].sum(1)


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a conversation up to where the answer begins."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

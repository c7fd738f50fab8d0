"""The tiny world's base model: made with random weights, then fine-tuned by a plain loop that takes seconds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.tiny_world.world import TinyWorld

_SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "micro": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3},
}


def new_model(world: TinyWorld, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, tied embeddings, fp32, sized by the world's preset. The caller's random
    state is left alone."""
    config = LlamaConfig(
        **_SHAPES[world.preset],
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    *,
    seed: int = 0,
    epochs: int = 1,
    batch_size: int = 8,
    lr: float = 3e-3,
    progress: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train `model` in place on conversational prompt-completion examples and return the mean loss of the last tenth.

    The whole conversation is learned, prompt included: a model from nothing needs the prompts' words too. Batches hold
    examples of similar length, so that little is padding. AdamW, linear warm-up over the first 5% of the steps, then
    linear decay to 0. `progress(step, total, loss)` is called after every step. Equal arguments give equal weights on
    one machine with one thread.
    """
    texts = [
        tokenizer.apply_chat_template([*example["prompt"], *example["completion"]], tokenize=False)
        for example in examples
    ]
    sequences = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    rng = random.Random(seed)
    batches = [batch for _ in range(epochs) for batch in _batches_by_length(sequences, batch_size, rng)]
    total, warmup = len(batches), max(1, len(batches) // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup + 1))
    )
    losses = []
    model.train()
    for step, batch in enumerate(batches, start=1):
        ids_BL = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100).to(model.device)
        # Padding is on the right and attention is causal, so no real token attends to it.
        logits_BLV = model(input_ids=ids_BL.clamp(min=0)).logits
        loss = functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step, total, losses[-1])
    model.eval()
    tail = losses[-math.ceil(total / 10) :]
    return sum(tail) / len(tail)


def _batches_by_length(sequences: list[torch.Tensor], size: int, rng: random.Random) -> Iterator[list[torch.Tensor]]:
    """One epoch of batches of near-equal length in random order."""
    order = rng.sample(sequences, len(sequences))
    order.sort(key=len)  # stable, so ties stay shuffled
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    yield from batches

"""What a forward pass of pairs leaves out: the head where no answer is, and with `padding_free` all padding.

On CPUs TRL's fused head scores every position, prompts as well, and throws that away: with a vocabulary of 262,144
entries most of a step's work. `padding_free` is a field of TRL's `DPOConfig` that TRL 1.16 only warns about: here the
conversations of a batch are laid end to end in one row, and each attends to itself alone.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import from_pretrained

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields of TRL's `FusedCausalLMOutput` with one number a position."""
END_TO_END = "prefvec_end_to_end"
"""Name of the attention below, among transformers' own."""
_BOUNDS: ContextVar[Tensor | None] = ContextVar("bounds", default=None)


def score_answers_only(model: PreTrainedModel | PeftModel, *, padding_free: bool = False) -> None:
    """Let a model that has TRL's fused head (`add_fused_lm_head`) project only positions whose label counts.

    On GPUs TRL does so itself. The outputs are the same, positions without a label being 0 in both.

    Args:
        padding_free: also lay the rows of a batch end to end, without their padding. The first batch is computed both
            ways and compared.

    Raises:
        InputError: from the first forward pass, if the model mixes conversations that lie in one row.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    fused = base.forward
    if padding_free:
        base.set_attn_implementation(END_TO_END)
    compared = not padding_free

    @functools.wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        nonlocal compared
        whole = functools.partial(fused, *args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        if not fused_lm_head or labels is None or not (padding_free or labels.device.type == "cpu"):
            return whole()
        answers = labels[:, 1:] != -100
        if not answers.any():
            return whole()
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if not padding_free:
            return _answers(base, fused, answers, following, args, kwargs)
        real = kwargs["attention_mask"].bool()
        with _end_to_end(real, kwargs) as flat:
            outputs = _answers(base, fused, answers, following[real][None], args, flat)
        if not compared:
            with torch.no_grad():
                _compare(outputs.log_probs, whole().log_probs)
            compared = True
        return outputs

    base.forward = forward


def _answers(
    base: PreTrainedModel, fused: Any, answers: Tensor, following: Tensor, args: tuple[Any, ...], given: dict[str, Any]
) -> Any:
    """TRL's outputs of the batch whose positions with a next token that counts are `answers`.

    Args:
        following: the label of the next token, -100 where none counts, in the form of the inputs.
    """
    scored = following != -100

    def pick(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[scored].unsqueeze(0)
        return output

    picking = base.base_model.register_forward_hook(pick)
    try:
        outputs = fused(*args, fused_lm_head=True, shift_labels=following[scored].unsqueeze(0), **given)
    finally:
        picking.remove()
    for name in PER_TOKEN:
        if (values := getattr(outputs, name)) is not None:
            setattr(outputs, name, values.new_zeros(answers.shape).masked_scatter(answers, values))
    outputs.label_mask = answers
    return outputs


@contextmanager
def _end_to_end(real: Tensor, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs in one row without padding; within, the model's attention knows where each conversation begins."""
    lengths = real.sum(1)
    positions = (real.long().cumsum(1) - 1)[real]
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).cpu()
    flat = {"input_ids": given["input_ids"][real][None], "position_ids": positions[None], "attention_mask": None}
    token = _BOUNDS.set(bounds)
    try:
        yield {**given, **flat}
    finally:
        _BOUNDS.reset(token)


def _bounds_as_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """In place of a mask: the window of a layer (0: all), and where each conversation begins and the last one ends.

    It reaches the layers as the mask would, also when activation checkpointing computes them again.
    """
    bounds = _BOUNDS.get()
    if bounds is None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    return torch.cat([bounds.new_tensor([local_size or 0]), bounds])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """torch's attention of each conversation to itself; of padded rows where `attention_mask` is a mask."""
    if attention_mask is None or attention_mask.dim() != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window, *bounds = attention_mask.tolist()
    parts = []
    for start, end in pairwise(bounds):
        own = (slice(None), slice(None), slice(start, end))
        mask = None
        if 0 < window < end - start:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(1 - window)[None, None]
        parts.append(sdpa_attention_forward(module, query[own], key[own], value[own], mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _compare(flat: Tensor, padded: Tensor) -> None:
    off = (flat.float() - padded.float()).abs().max().item()
    if off > (0.5 if flat.dtype != torch.float32 or torch.is_autocast_enabled(flat.device.type) else 1e-3):
        raise InputError(
            f"dpo.padding_free: log-probs of this base differ by up to {off:.3g} nats from those of padded batches; "
            "it does not keep conversations of one row apart: leave padding_free out"
        )


def check_padding_free(base: str | Path, recipe: Mapping[str, Any]) -> None:
    """InputError for a base whose layers cannot keep conversations of one row apart, before it is loaded."""
    options = recipe.get("model_init_kwargs") or {}
    if (given := options.get("attn_implementation", "sdpa")) != "sdpa":
        raise InputError(
            f"dpo.padding_free computes with torch's attention, not {given}: leave attn_implementation out"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, base))
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if (
        others
        or model._is_stateful
        or not model._can_set_attn_implementation()
        or config._attn_implementation != "sdpa"
    ):
        raise InputError(
            f"dpo.padding_free: {type(model).__name__} has layers other than torch's attention, full or with a sliding "
            "window, which cannot keep conversations of one row apart: leave padding_free out"
        )


AttentionInterface.register(END_TO_END, _attend)
AttentionMaskInterface.register(END_TO_END, _bounds_as_mask)

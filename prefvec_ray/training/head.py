"""The head of a model at the positions of answers alone, on CPUs, where TRL's fused head scores every position."""

import functools
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields of TRL's `FusedCausalLMOutput` with one number a position."""


def score_answers_only(model: PreTrainedModel | PeftModel) -> None:
    """Let a model that has TRL's fused head (`add_fused_lm_head`) project only positions whose label counts.

    On GPUs TRL does so itself. On CPUs it scores prompts as well and throws that away: with a vocabulary of 262,144
    entries most of a step's work. The outputs are the same, positions without a label being 0 in both.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    fused = base.forward

    @functools.wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        whole = functools.partial(fused, *args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        if not fused_lm_head or labels is None or labels.device.type != "cpu":
            return whole()
        answers = labels[:, 1:] != -100
        if not answers.any():
            return whole()

        def pick(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, :-1][answers].unsqueeze(0)
            return output

        picking = base.base_model.register_forward_hook(pick)
        try:
            outputs = fused(*args, fused_lm_head=True, shift_labels=labels[:, 1:][answers].unsqueeze(0), **kwargs)
        finally:
            picking.remove()
        for name in PER_TOKEN:
            if (values := getattr(outputs, name)) is not None:
                setattr(outputs, name, values.new_zeros(answers.shape).masked_scatter(answers, values))
        outputs.label_mask = answers
        return outputs

    base.forward = forward

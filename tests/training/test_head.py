"""On CPUs the head is computed for answers alone, with `padding_free` padding is left out, and nothing else changes."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.errors import InputError
from prefvec_ray.training.dpo import TokenizedDPOTrainer, dpo_config, reference_logps
from prefvec_ray.training.head import PER_TOKEN, check_padding_free, score_answers_only
from prefvec_ray.training.lora import adapter_config
from prefvec_ray.training.model import load_model, load_tokenizer
from prefvec_ray.training.sft import SftJob, run_sft

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def gemma():
    """A tied head and capped logits."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=5.0))


def adapted():
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def gpt2():
    """Learned positions."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def mamba():
    """Recurrent: what lies in one row is one conversation."""
    return MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2))


def batch():
    """Four conversations, padded on the right, whose first three to six tokens are the prompt."""
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(1))
    attention, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, end) in enumerate([(3, 12), (6, 9), (4, 10), (5, 6)]):
        attention[row, end:] = 0
        labels[row, :prompt] = labels[row, end:] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def scored(model, inputs, outputs):
    """What the model gives, and the gradients of its loss weighted by position."""
    given = model(**inputs, fused_lm_head=True)
    weights = torch.linspace(0.5, 2.0, given.log_probs.numel()).view(given.log_probs.shape)
    (given.log_probs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: getattr(given, name) for name in (*outputs, "label_mask", "loss")}, gradients


@pytest.fixture
def rows(monkeypatch):
    """How many rows each call of TRL's head was given."""
    counts = []
    apply = utils._ChunkedLogProbFunction.apply

    def counted(hidden: Tensor, *rest: Any) -> Any:
        counts.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", counted)
    return counts


@pytest.mark.parametrize("make", [llama, gemma, adapted])
def test_the_same_outputs_and_gradients_from_the_rows_of_answers_alone(make, rows):
    torch.manual_seed(0)
    model, inputs = make(), batch()
    add_fused_lm_head(model.get_base_model() if make is adapted else model, outputs=PER_TOKEN)
    before, gradients_before = scored(model, inputs, PER_TOKEN)
    score_answers_only(model)
    after, gradients_after = scored(model, inputs, PER_TOKEN)

    assert rows == [4 * 11, int((inputs["labels"][:, 1:] != -100).sum())]
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, msg=name)
    assert gradients_after.keys() == gradients_before.keys()
    for name, expected in gradients_before.items():
        torch.testing.assert_close(gradients_after[name], expected, msg=name)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("make", [llama, gemma, gpt2, adapted])
def test_the_same_outputs_and_gradients_without_padding(make, recomputed):
    torch.manual_seed(0)
    model, inputs = make().eval(), batch()
    add_fused_lm_head(model.get_base_model() if make is adapted else model, outputs=PER_TOKEN)
    before, gradients_before = scored(model, inputs, PER_TOKEN)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    score_answers_only(model, padding_free=True)
    if recomputed:
        model.train().gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    scored(model, inputs, PER_TOKEN)
    after, gradients_after = scored(model, inputs, PER_TOKEN)

    assert seen == [(1, int(inputs["attention_mask"].sum())), (4, 12), (1, int(inputs["attention_mask"].sum()))]
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, msg=name)
    assert gradients_after.keys() == gradients_before.keys()
    for name, expected in gradients_before.items():
        torch.testing.assert_close(gradients_after[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_base_that_mixes_what_lies_in_one_row_is_refused(tmp_path):
    model = mamba()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="MambaForCausalLM has layers other than torch's attention"):
        check_padding_free(tmp_path, {})
    add_fused_lm_head(model, outputs=PER_TOKEN)
    score_answers_only(model, padding_free=True)
    with pytest.raises(InputError, match=r"padding_free: log-probs of this base differ by up to 0\.\d+ nats"):
        scored(model, batch(), PER_TOKEN)


def test_batches_without_an_answer_and_plain_calls_are_left_as_they_are():
    model, inputs = llama(), batch()
    plain = model(**inputs).logits
    add_fused_lm_head(model, outputs=PER_TOKEN)
    score_answers_only(model)
    torch.testing.assert_close(model(**inputs).logits, plain)
    assert not model.base_model._forward_hooks
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    given = model(**nothing, fused_lm_head=True)
    assert given.log_probs.shape == (4, 11)
    assert given.log_probs.count_nonzero() == 0
    given.log_probs.sum().backward()


@pytest.mark.parametrize("method", [Method(), Method(kind="lora", lora={"r": 2})])
def test_reference_pass_and_dpo_project_no_prompt(world_folder, tmp_path, rows, method):
    base, recipe = str(world_folder / "base"), {"per_device_train_batch_size": 2, "max_steps": 1}
    pairs = Dataset.from_list([{"prompt": "a b c", "chosen": " d", "rejected": " e f"}] * 2)
    tokens = reference_logps(base, pairs, recipe, tmp_path, method)
    answers = sum(len(tokens[column][row]) for column in ("chosen_ids", "rejected_ids") for row in range(2))
    assert rows == [answers]
    args = dpo_config(recipe, tmp_path)
    model = load_model(base, method, args)
    trainer = TokenizedDPOTrainer(
        model=model,
        args=args,
        train_dataset=tokens,
        processing_class=load_tokenizer(base),
        peft_config=adapter_config(method),
    )
    trainer.train()
    assert rows == [answers] * 2


def test_the_sft_stage_projects_no_prompt(world_folder, tmp_path, rows):
    base = str(world_folder / "base")
    examples = Dataset.from_list([{"prompt": "a b c", "completion": " d e"}] * 2)
    examples.save_to_disk(tmp_path / "examples")
    data = next((tmp_path / "examples").glob("*.arrow"))
    job = SftJob(
        base=base,
        base_fingerprint="none",
        data_digest="none",
        recipe={"max_steps": 1, "per_device_train_batch_size": 2},
        method=Method(),
        data=str(data),
        checkpoint_every=None,
        out=str(tmp_path / "sft"),
    )
    run_sft(job, lambda values: None, tmp_path / "work")
    whole = len(load_tokenizer(base)("a b c d e").input_ids) + 1  # its end
    assert len(rows) == 1
    assert 0 < rows[0] < 2 * (whole - 1)

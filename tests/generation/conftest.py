"""A tiny random Llama, its tokenizer and two random low-rank vectors, as folders: what generating starts from."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.vectors import (
    LiveModel,
    LowRank,
    PreferenceVector,
    VectorInfo,
    fingerprint,
    load_vector,
    save_vector,
)

Alone: TypeAlias = Callable[[Sequence[int], Mapping[str, float], int], list[int]]

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards cook naïve crème brûlée at 12:30 — why not? "
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with grouped heads and a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # wide, so that greedy tokens have clear winners
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vector_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Low-rank vectors `helpful` and `harmless` on every linear layer, large enough to change most answers."""
    model = LlamaForCausalLM.from_pretrained(base_folder)
    base = fingerprint(base_folder)
    folders = {}
    for seed, preference in enumerate(("helpful", "harmless"), start=1):
        draw = torch.Generator().manual_seed(seed)
        entries = {
            name: LowRank(
                torch.randn(4, weight.shape[1], generator=draw) * 0.1,
                torch.randn(weight.shape[0], 4, generator=draw) * 0.2,
            )
            for name, weight in model.named_parameters()
            if name.endswith("proj.weight")
        }
        info = VectorInfo(preference=preference, form="low-rank", dtype="float32", base_fingerprint=base)
        folder = tmp_path_factory.mktemp("vectors") / preference
        folders[preference] = save_vector(PreferenceVector(info, entries), folder)
    return folders


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(base_folder)


@pytest.fixture(scope="session")
def vectors(vector_folders: dict[str, Path]) -> dict[str, PreferenceVector]:
    return {name: load_vector(folder) for name, folder in vector_folders.items()}


@pytest.fixture(scope="session")
def merged_alone(base_folder: Path, vectors: dict[str, PreferenceVector]) -> Alone:
    """What a model merged for one request alone answers, greedily, by transformers' own `generate`."""
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    live = LiveModel(model, vectors)

    def answer(prompt: Sequence[int], coefficients: Mapping[str, float], max_new_tokens: int) -> list[int]:
        live.set_coefficients(coefficients)
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return whole[0, len(prompt) :].tolist()

    return answer

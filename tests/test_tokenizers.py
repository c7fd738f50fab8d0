"""The configs, and every reader of a chat, with tokenizers that follow the rules of real models' tokenizers.

Small stand-ins, built here: bytes as vocabulary, but special tokens, what is put before and behind a text, and the
shape of chat templates as in Llama-3, Mistral and Gemma.
"""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from prefvec_ray.common.chat import end_tokens, special_tokens, template_ends
from prefvec_ray.common.config import load_config
from prefvec_ray.evaluation.generate import encode
from prefvec_ray.preferences.measures import tokenize_pair
from prefvec_ray.serving.encoding import Tokenization
from prefvec_ray.training import PreferenceData, TrainingConfig
from prefvec_ray.training.dpo import reference_logps
from prefvec_ray.training.model import base_ends, load_tokenizer
from prefvec_ray.training.references import working_base
from prefvec_ray.training.train import check_data, prepare_data

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*saferlhf*.yaml"))

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level(bos: str, eos: str, special: list[str], template: str | None) -> PreTrainedTokenizerFast:
    """As Llama-3's: bytes, the BOS token put before every text by the post-processor, no pad token."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([bos, eos, *special])
    return finished(tokenizer, bos, eos, special, template)


def spaces_as_marks(
    bos: str, eos: str, special: list[str], template: str | None, *, prefix: bool
) -> PreTrainedTokenizerFast:
    """As Mistral's (with `prefix`: a space before every text) and Gemma's: spaces are `▁`, other characters bytes."""
    letters = sorted({*string.printable, "▁"} - {" "})
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    marks = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([bos, eos, *special])
    return finished(tokenizer, bos, eos, special, template)


def finished(
    tokenizer: Tokenizer, bos: str, eos: str, special: list[str], template: str | None
) -> PreTrainedTokenizerFast:
    begin = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, begin)])
    given = {"bos_token": bos, "eos_token": eos, "additional_special_tokens": special}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=10**6, **given)
    whole.chat_template = template
    return whole


LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
STAND_INS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "Llama-3": lambda: byte_level(*LLAMA, None),
    "Llama-3-Instruct": lambda: byte_level(*LLAMA, HEADERS),
    "Mistral": lambda: spaces_as_marks("<s>", "</s>", [], None, prefix=True),
    "Mistral-Instruct": lambda: spaces_as_marks("<s>", "</s>", [], BRACKETS, prefix=True),
    "Gemma-it": lambda: spaces_as_marks("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], TURNS, prefix=False),
}
TEMPLATED = ["Llama-3-Instruct", "Mistral-Instruct", "Gemma-it"]
ROWS = [
    {
        "prompt": f"Wie geht das, Nr. {i}?  Say {i + 1} then.",
        "response_0": f"So: {i} \n Ende.",
        "response_1": f"Gar nicht, und das ist gut so: {i} mal.",
        "better_response_id": i % 2,
        "safer_response_id": (i + 1) % 2,
    }
    for i in range(80)
]
TALK = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2+2? é"},
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a stand-in's tokenizer and a tiny model."""
    folder = tmp_path_factory.mktemp("stand-ins")

    def write(name: str) -> Path:
        if not (folder / name).is_dir():
            tokenizer = STAND_INS[name]()
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
            LlamaForCausalLM(LlamaConfig(**sizes, **shape, **ids)).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return write


@pytest.fixture
def pku(tmp_path: Path) -> str:
    path = tmp_path / "pku.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_its_model_from_one_bos_to_an_end(path, base_of, pku, tmp_path, monkeypatch):
    """The six configs for Llama and Mistral, on their base's stand-in: what DPO trains on, token by token."""
    monkeypatch.setenv("PREFVEC_SHARED", str(tmp_path))
    monkeypatch.setenv("PREFVEC_REGISTRY", str(tmp_path / "registry"))
    given = load_config(path, TrainingConfig)
    pairs = {name: PreferenceData(data=pku, format="pku-saferlhf") for name in given.preferences}
    family = "Mistral" if "Mistral" in given.base.name else "Llama-3"
    talks = tmp_path / "talks.jsonl"
    talks.write_text(json.dumps({"messages": [*TALK, {"role": "assistant", "content": "4."}]}))
    assert given.sft is not None
    sft = given.sft.model_copy(update={"data": str(talks), "split": None})
    changes = {"base": base_of(family), "preferences": pairs, "output": tmp_path, "global_batch_size": 16, "sft": sft}
    config = given.model_copy(update=changes)

    splits, found = check_data(config)
    assert not found.errors
    assert found.demonstrations is not None
    assert found.demonstrations.warnings == []
    noticed = " ".join(finding.text for finding in found.findings)
    assert "BOS" not in noticed
    assert "end token" not in noticed
    assert "tokenized otherwise" not in noticed
    prepare_data(config)  # writes the base with its template
    recipe = {"per_device_train_batch_size": 8, "max_length": config.dpo["max_length"]}
    some = splits["helpful"].train.select(range(8))
    scored = reference_logps(str(working_base(config)), some, recipe, tmp_path / "work")
    tokenizer = load_tokenizer(working_base(config))
    ends = base_ends(working_base(config), tokenizer)
    for row in scored:
        for side in ("chosen_ids", "rejected_ids"):
            whole = row["prompt_ids"] + row[side]
            assert whole[0] == tokenizer.bos_token_id
            assert whole.count(tokenizer.bos_token_id) == 1
            assert whole[-1] in ends
            assert sum(token in ends for token in whole) == 1


@pytest.mark.parametrize("name", TEMPLATED)
def test_what_is_trained_sampled_and_served_is_one_tokenization(name, base_of):
    tokenizer = load_tokenizer(base_of(name))
    prompt, chosen, _ = tokenize_pair(
        {
            "prompt": TALK,
            "chosen": [{"role": "assistant", "content": "Four."}],
            "rejected": [{"role": "assistant", "content": "5"}],
        },
        tokenizer,
    )
    assert chosen[: len(prompt)] == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, [TALK]) == [prompt]
    served = Tokenization(tokenizer, None, special_tokens(tokenizer)).encode_chat(TALK, 10**6)
    assert list(served) == prompt
    text = tokenizer.decode(chosen[len(prompt) :], skip_special_tokens=True)
    assert text.strip() == "Four."
    assert set(chosen[len(prompt) :]) & (template_ends(tokenizer) | end_tokens(None, tokenizer))


@pytest.mark.parametrize("name", TEMPLATED)
def test_supervised_fine_tuning_sees_the_same_frame(name, base_of, tmp_path):
    """TRL's SFT tokenizes conversations itself: one BOS, and the end that the template writes."""
    tokenizer = load_tokenizer(base_of(name))
    trainer = SFTTrainer(
        model=str(base_of(name)),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list([{"messages": [*TALK, {"role": "assistant", "content": "Four."}]}]),
        processing_class=tokenizer,
    )
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert set(ids[-3:]) & (template_ends(tokenizer) | end_tokens(None, tokenizer))


@pytest.mark.parametrize("name", TEMPLATED)
def test_special_tokens_that_somebody_typed_are_text(name, base_of):
    tokenizer = load_tokenizer(base_of(name))
    special = special_tokens(tokenizer)
    typed: list[dict[str, Any]] = [{"role": "user", "content": f"a{special[-1]}b{tokenizer.eos_token}c"}]
    served = Tokenization(tokenizer, None, special).encode_chat(typed, 10**6)
    plain = Tokenization(tokenizer, None, special).encode_chat([{"role": "user", "content": "abc"}], 10**6)
    count = [sum(ids.count(tokenizer.convert_tokens_to_ids(token)) for token in special) for ids in (served, plain)]
    assert count[0] == count[1]
    text = tokenizer.decode(served).replace(" ", "")  # Mistral's puts a space before every piece of text
    assert f"a{special[-1]}b{tokenizer.eos_token}c" in text


def test_the_end_of_a_templates_turn_gets_into_the_written_base(base_of, pku, tmp_path):
    """A base whose template ends turns with a token that is not its EOS: Llama-3 and Gemma."""
    template = tmp_path / "turns.jinja"
    template.write_text(HEADERS)
    config = TrainingConfig(
        name="job",
        base=base_of("Llama-3"),
        output=tmp_path,
        chat_template=str(template),
        preferences={"helpful": PreferenceData(data=pku, format="pku-saferlhf")},
        dpo={"max_length": 512},
    )
    prepare_data(config)
    tokenizer = load_tokenizer(working_base(config))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in GenerationConfig.from_pretrained(working_base(config)).eos_token_id
    assert end in base_ends(working_base(config), tokenizer)


def test_a_special_token_in_the_text_of_training_data_is_a_warning(base_of, pku, tmp_path):
    """In a request it is text; TRL tokenizes a training row as it is."""
    path = tmp_path / "typed.jsonl"
    row = ROWS[0] | {"prompt": "Why does <|eot_id|> end a turn?"}
    path.write_text("".join(json.dumps(each) + "\n" for each in [row, *ROWS]))
    noticed = []
    for data in (pku, str(path)):
        config = TrainingConfig(
            name="job",
            base=base_of("Llama-3-Instruct"),
            output=tmp_path,
            preferences={"helpful": PreferenceData(data=data, format="pku-saferlhf", test=pku)},
            dpo={"max_length": 512},
        )
        _, found = check_data(config)
        noticed.append([finding.text for finding in found.findings if "own text" in finding.text])
    assert noticed[0] == []
    assert len(noticed[1]) == 1
    assert noticed[1][0].startswith("helpful: 1 of 81 pairs have '<|eot_id|>' in their own text")

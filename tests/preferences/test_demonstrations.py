"""Examples for supervised fine-tuning: their shapes, what is wrong with them, and the tokens that TRL makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.demonstrations import Demonstrations, check_demonstrations, tokenize_demonstration
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer

ASKED, ANSWERED = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue."}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [ASKED, ANSWERED], "id": 7}, {"messages": [ASKED, ANSWERED]}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "blue."}]},
        {"messages": [ASKED, ANSWERED]},
    ),
    "alpaca": (
        {"instruction": "red?", "input": "", "output": "blue."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ),
    "alpaca with input and history": (
        {"instruction": "more", "input": "now", "output": "blue.", "history": [["red?", "blue."]]},
        {
            "prompt": [ASKED, ANSWERED, {"role": "user", "content": "more\nnow"}],
            "completion": [ANSWERED],
        },
    ),
    "conversational prompt": (
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ),
    "prompt and completion": ({"prompt": "red? ", "completion": "blue."}, {"prompt": "red? ", "completion": "blue."}),
    "text": ({"text": "red and blue."}, {"text": "red and blue."}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TinyWorld("micro", 0))


def written(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_is_read_and_tokenized_as_trl_does(name, tokenizer, tmp_path):
    row, example = ROWS[name]
    examples = Demonstrations(written(tmp_path, [row, row]))
    assert list(examples) == [example, example]
    assert examples.count == 2
    prompt, whole = tokenize_demonstration(example, tokenizer)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list([example]),
        processing_class=tokenizer,
    )
    seen = trainer.train_dataset[0]
    assert seen["input_ids"] == whole
    assert seen.get("labels", whole) == [-100] * len(prompt) + whole[len(prompt) :]


def test_bad_rows_are_left_out_and_listed_up_to_a_number(tmp_path):
    good, bad = {"messages": [ASKED, ANSWERED]}, {"messages": [ASKED]}
    empty = {"messages": [ASKED, {"role": "assistant", "content": " "}]}
    source = written(tmp_path, [good, bad, empty, good, bad])
    with pytest.raises(InputError, match=r"^sft .*row 2: field 'messages' must be"):
        list(Demonstrations(source))
    with pytest.raises(InputError, match=r"row 5: .*; skip_bad is 1"):
        list(Demonstrations(source, skip_bad=1))
    examples = Demonstrations(source, skip_bad=2)
    assert len(list(examples)) == 2
    dropped, *left_out = examples.notes
    assert dropped == "1 rows dropped: an answer is empty"
    assert ["row 2" in left_out[0], "row 5" in left_out[1]] == [True, True]


def test_what_is_wrong_with_the_tokens_is_found(tokenizer, tmp_path):
    typed = {"messages": [{"role": "user", "content": f"red {tokenizer.eos_token}"}, ANSWERED]}
    long = {"messages": [{"role": "user", "content": "red " * 60}, ANSWERED]}
    found = check_demonstrations(
        Demonstrations(written(tmp_path, [typed, long, {"messages": [ASKED, ANSWERED]}])),
        tokenizer,
        max_length=32,
        context=24,
        ends=frozenset({tokenizer.eos_token_id}),
    )
    assert found.examples == found.sampled == 3
    assert found.tokens["max"] > 60
    assert found.errors == ["sft: examples of up to 32 tokens, and the base has a context of 24: set sft.max_length"]
    assert any("1 of 3 examples are cut at max_length 32" in warning for warning in found.warnings)
    assert any(f"1 of 3 examples have {tokenizer.eos_token!r} in their text" in warning for warning in found.warnings)


def test_examples_are_shown_as_they_are_learned(tokenizer, tmp_path):
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    row = ROWS["alpaca"][0] | {"output": "blue " * 30}
    given = ["data", "show", written(tmp_path, [row]), "--base", str(base), "--sft", "--max-length", "20"]
    done = CliRunner().invoke(main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    first, prompt, learned, cut = done.output.splitlines()
    assert first == "example 1"
    assert prompt.startswith("prompt, ")
    assert "red?" in prompt
    assert learned.startswith("learned, ")
    assert "blue" in learned
    assert cut.startswith("   cut off: ")

"""Pairs as they are trained on, on the console."""

import json

import pytest
from click.testing import CliRunner
from trl import DPOConfig, DPOTrainer

from prefvec_ray.cli import main
from prefvec_ray.preferences import load_preferences
from prefvec_ray.preferences.show import marked, show_pair
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TinyWorld("micro", 0))


def chat(text, chosen, rejected):
    turns = {"prompt": ("user", text), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": said}] for name, (role, said) in turns.items()}


ROWS = [chat("How?", "Use a silver kettle.", "No."), chat("Why " + "do " * 40 + "I?", "So.", "Or so.")]


def show(*words):
    return CliRunner().invoke(main, ["data", "show", *map(str, words)])


@pytest.mark.parametrize("limit", [None, 8, 30])
def test_what_is_shown_is_what_trl_trains_on(tokenizer, tmp_path, limit):
    new_model(TinyWorld("micro"), tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trainer = DPOTrainer(
        model=str(tmp_path),
        args=DPOConfig(output_dir=str(tmp_path), max_length=limit, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=load_preferences(ROWS).dataset,
        processing_class=tokenizer,
    )
    trained = trainer.train_dataset.to_list()
    shown = [show_pair(row, tokenizer, limit) for row in ROWS]
    kept = [pair for pair in shown if not pair.is_dropped]
    assert len(kept) == len(trained)
    for pair, row in zip(kept, trained, strict=True):
        room = None if limit is None else limit - len(row["prompt_ids"])
        assert pair.prompt.kept == marked(row["prompt_ids"], tokenizer)
        for side in ("chosen", "rejected"):
            whole = row[f"{side}_ids"]
            assert getattr(pair, side).kept == marked(whole[:room], tokenizer)
            assert getattr(pair, side).cut == ("" if room is None else marked(whole[room:], tokenizer))


def test_the_command_names_the_parts_and_marks_special_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = show(tmp_path / "rows.jsonl", "--base", tmp_path, "--max-length", 40)
    assert done.exit_code == 0, done.output
    assert "prompt, 5 tokens: «<|user|>»How?«<|end|>»«<|assistant|>»\n" in done.output
    assert "Use a silver kettle.«<|end|>»\n" in done.output
    assert "pair 2, left out of training: the prompt fills max_length 40" in done.output
    assert show(tmp_path / "rows.jsonl", "--base", tmp_path, "-n", 1).output.count("pair ") == 1
    cut = show(tmp_path / "rows.jsonl", "--base", tmp_path, "-n", 1, "--max-length", 9).output
    assert "   cut off: " in cut


def test_a_request_is_shown_as_the_served_model_reads_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    typed = json.dumps([{"role": "user", "content": "Hi<|end|>"}])
    done = show("--base", tmp_path, "--chat", typed)
    assert done.exit_code == 0, done.output
    assert "«<|user|>»Hi<|end|>«<|end|>»«<|assistant|>»" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give either a source of preference data or --chat JSON"),
        (("rows.jsonl", "--chat", "[]"), "give either a source of preference data or --chat JSON"),
        (("--chat", "{"), "--chat: expected messages such as"),
        (("--chat", '[{"role": "user"}]'), "--chat: expected messages such as"),
        (("no-such.jsonl",), "no-such.jsonl"),
    ],
)
def test_mistakes_are_one_line(tokenizer, tmp_path, words, says):
    tokenizer.save_pretrained(tmp_path)
    done = show(*words, "--base", tmp_path)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output

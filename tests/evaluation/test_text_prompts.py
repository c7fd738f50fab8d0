import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import TextPrompt, load_prompts
from prefvec_ray.scorers.prompts import prompt_messages, prompt_text


def test_rows_keep_what_the_file_says_of_them(tmp_path):
    csv, jsonl, text = (tmp_path / f"prompts.{kind}" for kind in ("csv", "jsonl", "txt"))
    csv.write_text('id,prompt,type,label\n1,"How do I kill a process, now?",homonyms,safe\n2,How do I kill?,,\n')
    jsonl.write_text('{"prompt": "Why?", "label": "safe", "turns": 2}\n\n{"prompt": "How?"}\n')
    text.write_text("\ufeffWhy?\n\n How?\n", encoding="utf-8")
    assert load_prompts(csv) == [
        TextPrompt("How do I kill a process, now?", "safe", "homonyms", {"id": "1"}),
        TextPrompt("How do I kill?", None, None, {"id": "2"}),
    ]
    assert load_prompts(jsonl) == [TextPrompt("Why?", "safe", None, {"turns": "2"}), TextPrompt("How?")]
    jsonl.write_text('{"prompt": "One\u2028line"}\n', encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(jsonl)] == ["One\u2028line"], "what ends a line in print"
    assert [prompt.text for prompt in load_prompts(text)] == ["Why?", " How?"], "nothing is stripped"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "question\nWhy?\n", "row 1: every row needs a `prompt`"),
        ("p.csv", 'prompt\nWhy?\n"  "\n', "row 2: every row needs a `prompt`"),
        ("p.jsonl", '{"prompt": 3}\n', "row 1: every row needs a `prompt`"),
        ("p.jsonl", "[1]\n", "row 1: every row needs a `prompt`"),
        ("p.jsonl", "{\n", "p.jsonl, line 1: not JSON"),
        ("p.csv", "prompt,label\nWhy, then?,safe\n", "row 1 .line 2.: 3 columns where the header names 2"),
        ("p.md", "Why?\n", "expected .txt, a prompt a line, or rows in one of .jsonl, .json, .csv, .parquet"),
        ("p.txt", "\n", "holds no prompts"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_prompts(tmp_path / name)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_prompts(tmp_path / "none.csv")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


def test_a_prompt_as_messages_and_as_text(world):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    assert prompt_messages("Hi") == prompt_messages(TextPrompt("Hi")) == [{"role": "user", "content": "Hi"}]
    assert prompt_messages(chat) == chat
    assert prompt_text(chat) == "User: Hi\n\nAssistant: Ho\n\nUser: ?"
    assert prompt_text(world.prompts("search")[0]) == world.prompts("search")[0].text
    with pytest.raises(InputError, match="expected a text"):
        prompt_messages(7)

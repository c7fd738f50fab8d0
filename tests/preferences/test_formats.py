import json
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import FORMATS, first_format, load_preferences

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "How?"), ("assistant", "Like this."), ("assistant", "No."))
)
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT, OTHER = (
    {"from": who, "value": text} for who, text in (("human", "How?"), ("gpt", "Like this."), ("gpt", "No."))
)

ROWS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "trl-implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "hh-rlhf": {"chosen": "\n\nHuman: How?\n\nAssistant: Like this.", "rejected": "\n\nHuman: How?\n\nAssistant: No."},
    "pku-saferlhf": {
        "prompt": "How?",
        "response_0": "No.",
        "response_1": "Like this.",
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "ultrafeedback": {
        "prompt": "How?",
        "prompt_id": "7",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "messages": [USER, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 4.5,
    },
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER},
    "alpaca": {"instruction": "How?", "input": "", "chosen": "Like this.", "rejected": "No."},
    "safe-unsafe": {"prompt": "How?", "response": ["Like this.", "No."]},
}


def load(*rows, **options):
    options = {"preference": "helpful" if "response_0" in rows[0] else None, **options}
    return load_preferences(rows, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_found_by_its_fields_and_gives_the_same_pair(name):
    loaded = load(ROWS[name])
    assert loaded.format == name
    assert loaded.dataset[0] == ROWS["trl"]
    assert loaded.why == f"its first row has the fields {', '.join(ROWS[name])}"
    assert load(ROWS[name], format=name).why == "given"


def test_plain_text_stays_plain_text():
    explicit = {"prompt": "How? ", "chosen": "Like this.", "rejected": "No."}
    implicit = {"chosen": "How? Like this.", "rejected": "How? No."}
    assert load(explicit).dataset[0] == explicit
    found = load(implicit)
    assert (found.format, found.dataset[0]) == (
        "trl-implicit",
        {"prompt": "How?", "chosen": " Like this.", "rejected": " No."},
    )


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (ROWS["hh-rlhf"] | {"prompt": "How?"}, ["trl", "hh-rlhf"]),
        (ROWS["pku-saferlhf"] | {"chosen": "a", "rejected": "b"}, ["trl", "pku-saferlhf"]),
        (ROWS["alpaca"] | {"prompt": "How?"}, ["trl", "alpaca"]),
    ],
)
def test_fields_that_fit_two_formats_are_refused_with_both_names(row, names):
    with pytest.raises(InputError, match="fit several formats") as error:
        load(row)
    assert ", ".join(names) in str(error.value)
    assert load(row, format=names[0], preference="helpful").format == names[0]


def test_system_messages_are_kept_or_folded_and_said_so():
    rows = [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        ROWS["sharegpt"] | {"system": "Be kind."},
        ROWS["sharegpt"] | {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN]},
        ROWS["alpaca"] | {"system": "Be kind."},
    ]
    for row in rows:
        assert load(row).dataset[0]["prompt"] == [SYSTEM, USER]
        folded = load(row, system="fold")
        assert folded.dataset[0]["prompt"] == [{"role": "user", "content": "Be kind.\n\nHow?"}]
        assert folded.notes == ("1 system messages folded into the first user message",)


def test_alpaca_input_and_history_come_in_their_places():
    row = ROWS["alpaca"] | {"input": "Now.", "history": [["Hi", "Hello"]]}
    assert load(row).dataset[0]["prompt"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How?\nNow."},
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROWS["safe-unsafe"] | {"response": ["a"]}, "'response' must be a list of two"),
        (ROWS["safe-unsafe"] | {"response": ["a", None]}, "'response' is missing"),
        (ROWS["ultrafeedback"] | {"prompt": "Why?"}, "is no user message of 'chosen'"),
        (ROWS["ultrafeedback"] | {"score_chosen": 1.0}, "score_chosen 1.0 is not above score_rejected 4.5"),
        (ROWS["ultrafeedback"] | {"score_chosen": "10", "score_rejected": "9"}, "score_chosen '10' is no number"),
        (ROWS["ultrafeedback"] | {"score_rejected": True}, "score_rejected True is no number"),
        (ROWS["sharegpt"] | {"chosen": {"from": "tool", "value": "x"}}, "chosen has a turn from 'tool'"),
        (ROWS["sharegpt"] | {"conversations": [HUMAN, GPT]}, "must end with human"),
        (ROWS["sharegpt"] | {"conversations": None}, "'conversations' must be a list"),
        (ROWS["sharegpt"] | {"tools": "[{}]"}, "tools are not supported"),
        (ROWS["alpaca"] | {"history": ["Hi"]}, "'history' must be a list"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "share no first message"),
        ({"chosen": "a", "rejected": "b"}, "no common beginning"),
        (ROWS["trl"] | {"chosen": [{"role": "assistant", "content": None}]}, "'content' is missing"),
        (ROWS["trl"] | {"prompt": [None]}, "'prompt' must be a list of messages"),
        (ROWS["trl"] | {"tools": [{"type": "function"}]}, "tools are not supported"),
        (ROWS["trl"] | {"chosen": [GOOD | {"tool_calls": [{"id": "1"}]}]}, "chosen has a call of a tool"),
        (ROWS["trl"] | {"prompt": [USER, {"role": "tool", "content": "dry"}, USER]}, "has a message of role 'tool'"),
        (ROWS["trl"] | {"prompt": [{"role": "developer", "content": "a"}, USER]}, "of role 'developer'; known are"),
        (ROWS["trl"] | {"rejected": [USER, BAD]}, "'rejected' repeats the messages of 'prompt'; leave the field"),
        (ROWS["trl-implicit"] | {"tools": [{}]}, "tools are not supported"),
        ({"prompt": str([USER]), "chosen": "a", "rejected": "b"}, "'prompt' is a list of messages written as text"),
        ({"prompt": "a", "chosen": json.dumps([GOOD]), "rejected": "b"}, "'chosen' is a list of messages written as"),
        ({"prompt": "a", "chosen": "a", "rejected": "\n[ {'content': 'b'}]"}, "'rejected' is a list of messages"),
        ({"chosen": str([USER, GOOD]), "rejected": str([USER, BAD])}, "'chosen' is a list of messages written as text"),
    ],
)  # fmt: skip
def test_what_does_not_follow_its_format_is_named_with_its_row(row, words):
    with pytest.raises(InputError, match=words) as error:
        load(row)
    assert "row 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [1.0, True, "1", 2, None])
def test_a_label_is_the_number_0_or_1(label):
    with pytest.raises(InputError, match=r"row 1: field 'better_response_id' is .*; expected 0 or 1"):
        load_preferences([ROWS["pku-saferlhf"] | {"better_response_id": label}], preference="helpful")


def test_pairs_that_say_nothing_are_counted_by_reason():
    tie = ROWS["ultrafeedback"] | {"score_rejected": 8.0}
    empty = ROWS["ultrafeedback"] | {"chosen": [USER, GOOD | {"content": " "}]}
    asked = ROWS["ultrafeedback"] | {
        key: [SYSTEM | {"content": ""}, USER, said] for key, said in (("chosen", GOOD), ("rejected", BAD))
    }
    loaded = load(ROWS["ultrafeedback"], tie, tie, empty, asked)
    assert loaded.dropped == {
        "both answers have the same score": 2,
        "an answer is empty": 1,
        "a message of the prompt is empty": 1,
    }
    assert (loaded.rows, len(loaded.dataset)) == (5, 1)


def test_an_answer_that_is_the_beginning_of_the_other_says_nothing():
    longer = {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    assert load(ROWS["trl-implicit"], longer).dropped == {"one answer is the beginning of the other": 1}
    text = {"chosen": "How? Like this.", "rejected": "How? Like this. Or so."}
    assert load({"chosen": "How? Yes.", "rejected": "How? No."}, text).dropped == {
        "one answer is the beginning of the other": 1
    }


@pytest.mark.parametrize("text", ["[1] is the first source", "[{'a': 1}]", '{"role": "user"}', "A [{'role': 1}]"])
def test_text_with_brackets_is_text(text):
    pair = load({"prompt": text, "chosen": "a", "rejected": "b"}).dataset[0]
    assert pair["prompt"] == text


def test_safe_unsafe_pairs_say_nothing_of_helpfulness():
    with pytest.raises(InputError, match=r"\[safe, unsafe\], which says nothing of 'helpful'"):
        load(ROWS["safe-unsafe"], preference="helpful")


def test_flaws_are_collected_where_asked_for():
    flaws: list[str] = []
    loaded = load(ROWS["trl"], {"prompt": 3}, ["a"], flaws=flaws)
    assert (len(loaded.dataset), loaded.rows, len(flaws)) == (1, 3, 2)
    assert "row 2" in flaws[0]


def test_the_first_row_alone_tells_the_format(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="no object with named fields"):
        first_format(tmp_path / "rows.jsonl")

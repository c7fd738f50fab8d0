"""What of OpenAI's API each engine answers: one request for each row of the table in docs/serving.md.

`check_table` sends them all, and compares: an answer where the table says yes; where it says no, a refusal that names
the field or route.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import jsonschema

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
CHAT, TEXT = "/chat/completions", "/completions"
ASK: dict[str, Any] = {"role": "user", "content": "the quick brown fox"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["fox", "dog"]}},
    "required": ["legs", "kind"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "count", "description": "Count legs.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "count"}}
CALLED = {"id": "call-1", "type": "function", "function": {"name": "count", "arguments": '{"legs": 4, "kind": "dog"}'}}
HISTORY: list[dict[str, Any]] = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call-1", "content": '{"counted": "four"}'},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}


def calls(answer: Any) -> list[tuple[str, Any]]:
    """The tools that the answer calls, with their arguments."""
    told = answer["choices"][0]["message"]["tool_calls"]
    return [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in told]


def check_named(answer: Any) -> None:
    (call,) = calls(answer)
    assert call[0] == "count"
    jsonschema.validate(call[1], SCHEMA)


def check_required(answer: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    called = calls(answer)
    assert called
    for name, arguments in called:
        jsonschema.validate(arguments, schemas[name])


def check_schema(answer: Any) -> None:
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)


def check_object(answer: Any) -> None:
    """A weak model may not come to the end of it."""
    assert answer["choices"][0]["message"]["content"].startswith("{")


def check_answers(number: int) -> Callable[[Any], None]:
    def check(answer: Any) -> None:
        assert len(answer["choices"]) == number

    return check


def check_logprobs(answer: Any) -> None:
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer["choices"][0]["logprobs"]["content"])


def check_echo(answer: Any) -> None:
    assert answer["choices"][0]["text"].startswith("the lazy dog")


CASES: dict[str, tuple[str, Mapping[str, Any], Callable[[Any], None] | None]] = {
    "`n`": (CHAT, {"n": 3, "temperature": 1.0}, check_answers(3)),
    "`stop`, `seed`, `temperature`, `top_p`": (
        CHAT,
        {"stop": ["zz"], "seed": 1, "temperature": 0.5, "top_p": 0.9},
        None,
    ),
    "`presence_penalty`, `frequency_penalty`, `logit_bias`": (
        CHAT,
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"40": 3}},
        None,
    ),
    "`top_k`, `min_p`, `repetition_penalty` (vLLM's)": (
        CHAT,
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 1.0},
        None,
    ),
    "`logprobs`, `top_logprobs`": (CHAT, {"logprobs": True, "top_logprobs": 2}, check_logprobs),
    "`max_tokens`, `max_completion_tokens`": (CHAT, {"max_tokens": None, "max_completion_tokens": 5}, None),
    "`response_format`: `json_object`": (CHAT, {"response_format": {"type": "json_object"}}, check_object),
    "`response_format`: `json_schema`": (CHAT, {"response_format": FORMAT}, check_schema),
    "`tools` with a named `tool_choice`": (CHAT, {"tools": TOOLS, "tool_choice": NAMED}, check_named),
    "`tools` with `tool_choice`: `required`, `parallel_tool_calls`": (
        CHAT,
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
        check_required,
    ),
    "`tools` with `tool_choice`: `auto`": (CHAT, {"tools": TOOLS}, None),
    "messages of `tool_calls` and of role `tool`": (CHAT, {"messages": HISTORY}, None),
    "`reasoning_effort`": (CHAT, {"reasoning_effort": "low"}, None),
    "images in messages": (CHAT, {"messages": [PICTURE]}, None),
    "`audio`, `modalities`": (CHAT, {"modalities": ["audio"], "audio": {"voice": "alloy", "format": "wav"}}, None),
    "`functions` (OpenAI's older form of tools)": (CHAT, {"functions": [{"name": "count"}]}, None),
    "several prompts, prompts of token ids": (TEXT, {"prompt": [[5, 6], [7]]}, check_answers(2)),
    "`echo`": (TEXT, {"echo": True}, check_echo),
    "`suffix`, `best_of`": (TEXT, {"suffix": "!", "best_of": 2}, None),
    "`/v1/responses`": ("/responses", {"input": "why?"}, None),
    "`/v1/embeddings`": ("/embeddings", {"input": "why?"}, None),
    "`vllm_xargs`, `cache_salt`": (CHAT, {"vllm_xargs": {"preferences": '{"harmless": -1}'}, "cache_salt": "x"}, None),
}


def check_table(url: str, column: int) -> None:
    """`column`: that of the engine at this URL, 1 for slots and 2 for vLLM."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text().splitlines()
        if line[:1] == "|"
    ]
    table = {row[0]: row[column] for row in rows if row[0] in CASES}
    assert table.keys() == CASES.keys(), "the table has a row for each case"
    found = {feature: _outcome(url, *case) for feature, case in CASES.items()}
    assert found == table


def _outcome(url: str, path: str, changes: Mapping[str, Any], check: Callable[[Any], None] | None) -> str:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "temperature": 0}
    body |= {"messages": [ASK]} if path == CHAT else {"prompt": "the lazy dog"}
    response = httpx.post(url + path, json={**body, **changes}, timeout=120)
    if response.is_success:
        if check:
            check(response.json())
        return "yes"
    error = response.json()["error"]
    assert response.status_code in (400, 404), error
    named = [*changes, "tool_calls", "content", path]
    assert any(name in error["message"] for name in named), error
    assert not re.search(
        r"ray|vllm|traceback|pydantic|/site-packages", error["message"].replace("vllm_xargs", ""), re.I
    )
    return "no"

"""Bodies for vLLM: what goes on to its server code, and what does not."""

import json
from typing import Any

import pytest

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.http.parsing import parse_body
from prefvec_ray.serving.http.vllm_protocol import VllmChatBody, VllmTextBody
from tests.serving.api_cases import ASK, FORMAT, HISTORY, NAMED, TOOLS

SETTING = (("harmless", 0.5), ("helpful", 1.0))


def chat(**changes: Any) -> VllmChatBody:
    body = {"model": "tiny@cautious", "messages": [ASK]} | changes
    return parse_body(json.dumps(body).encode(), VllmChatBody)


def test_a_body_goes_on_as_it_came_without_what_is_ours():
    changes = {"tools": TOOLS, "tool_choice": NAMED, "n": 2, "seed": 3, "stop": ["x"], "logit_bias": {"5": -100}}
    changes |= {"response_format": FORMAT, "stream": True, "stream_options": {"include_usage": True}, "top_k": 4}
    job = chat(**changes, preferences={"helpful": 1.0}, user="somebody", temperature=None).replica_request(SETTING, 7)
    assert job.body == {"messages": [ASK]} | changes
    assert (job.chat, job.coefficients, job.max_prompt_tokens) == (True, SETTING, 7)
    text = {"prompt": [[5, 6], [7]], "echo": True, "max_tokens": 3, "logprobs": 2}
    job = parse_body(json.dumps({"model": "tiny"} | text).encode(), VllmTextBody).replica_request(SETTING)
    assert (job.chat, job.body) == (False, text)


def test_a_default_schema_is_written_out():
    loose = {"type": "json_schema", "json_schema": {"name": "x"}}
    wanted = chat(response_format=loose).replica_request(SETTING).body["response_format"]
    assert wanted == {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


def test_messages_go_on_as_chat_templates_know_them():
    parts = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "Four.",
        "refusal": None,
        "annotations": [],
        "reasoning": "I count.",
    }
    passed = chat(messages=[parts, *HISTORY, answer]).replica_request(SETTING).body["messages"]
    assert passed[0] == {"role": "system", "content": "Be brief."}
    assert passed[2] == HISTORY[1] | {"content": ""}
    assert passed[3] == HISTORY[2]
    assert passed[4] == {"role": "assistant", "content": "Four.", "reasoning": "I count."}


def test_tools_and_calls_count_as_prompt():
    alone, with_tools = chat().prompt_tokens, chat(tools=TOOLS).prompt_tokens
    assert with_tools > alone + len(json.dumps(TOOLS)) // 8
    long = [{**HISTORY[1], "tool_calls": [{**HISTORY[1]["tool_calls"][0]}]}]
    long[0]["tool_calls"][0]["function"] = {"name": "count", "arguments": "9" * 4000}
    assert chat(messages=[ASK, *long]).prompt_tokens > alone + 900


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vllm_xargs": {"preferences": "{}"}}, "vllm_xargs: unknown field"),
        ({"cache_salt": "x"}, "cache_salt: unknown field"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: unknown field"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs: unknown field"),
        ({"audio": {"voice": "alloy"}}, "'audio' is not supported"),
        ({"tool_choice": "auto"}, "there are no 'tools' to choose from"),
        ({"tools": TOOLS, "tool_choice": NAMED | {"function": {"name": "fly"}}}, "'fly' is none of the 'tools'"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools.0"),
        ({"messages": [ASK | {"content": None}]}, "a message has 'content', or an assistant's 'tool_calls'"),
        ({"messages": [ASK | {"tool_calls": HISTORY[1]["tool_calls"]}]}, "'tool_calls' are an assistant's"),
        ({"messages": [ASK | {"tool_call_id": "call-1"}]}, "'tool_call_id' goes with role 'tool'"),
        (
            {"messages": [ASK | {"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
            "content",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
    ids=str,
)
def test_what_vllm_must_not_see_is_refused_by_name(changes, says):
    with pytest.raises(ApiError) as refused:
        chat(**changes)
    assert refused.value.status == 400
    assert says in str(refused.value)

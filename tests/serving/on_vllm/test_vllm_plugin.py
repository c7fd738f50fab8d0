"""vLLM's own server with preference vectors, and an unmodified client: nothing of ours between the two."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.vllm.options import WORKER
from prefvec_ray.serving.engines.vllm.section import parsed
from prefvec_ray.serving.vllm_plugin import ServedVectors
from tests.conftest import free_port

PROMPT = "the quick brown fox jumps over the lazy dog while seven wizards cook " * 5


def command(base: Path, port: int, section: Mapping[str, Any], *more: str) -> list[str]:
    """`vllm serve`, whose script the CPU build lacks."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--kv-cache-memory-bytes", str(2**26)),
        *("--worker-cls", WORKER, "--additional-config", json.dumps({"prefvec": section})),
        *more,
    ]


ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def section(registry_root: str) -> dict[str, Any]:
    ranges = {"harmless": {"min": 0.0, "max": 1.0, "default": 0.5}}
    return {
        "registry": registry_root,
        "vectors": {"helpful": "helpful@1", "harmless": "harmless@1"},
        "ranges": ranges,
    }


@pytest.fixture(scope="module")
def client(base_folder: Path, section: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "server.log"
    words = command(base_folder, port, section, "--enable-prompt-tokens-details")
    with log.open("wb") as file:
        server = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, log.read_text()[-5000:]
                time.sleep(0.5)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


@pytest.fixture
def complete(client: OpenAI) -> Callable[..., Any]:
    """An answer at these coefficients, greedy; None: without any."""

    def answer(etas: Mapping[str, float] | None, **named: Any) -> Any:
        extra = {} if etas is None else {"vllm_xargs": {"preferences": json.dumps(etas)}}
        named = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, **named}
        extra |= {"return_token_ids": True} | named.pop("extra_body", {})
        return client.completions.create(model="tiny", extra_body=extra, **named)

    return answer


def tokens(answer: Any) -> list[int]:
    return answer.choices[0].token_ids


def cached(answer: Any) -> int:
    details = answer.usage.prompt_tokens_details
    return (details and details.cached_tokens) or 0


def test_every_request_gets_its_own_merged_models_tokens(complete, tokenizer, merged_alone):
    settings = [{"helpful": 1 - i / 8, "harmless": i / 16} for i in range(16)]
    prompt = tokenizer(PROMPT)["input_ids"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(complete, settings))
    for etas, answer in zip(settings, answers, strict=True):
        assert tokens(answer) == merged_alone(prompt, etas, 24)
    assert len({tuple(tokens(answer)) for answer in answers}) > 8


def test_what_a_request_does_not_name_is_the_operators_default(complete):
    default = tokens(complete({"helpful": 0.0, "harmless": 0.5}))
    assert tokens(complete(None)) == tokens(complete({})) == default
    assert tokens(complete({"harmless": 0.0})) != default


def test_cached_blocks_are_read_at_the_same_coefficients_alone(complete, tokenizer, merged_alone):
    prompt = "a wizard cooks while the lazy dog jumps over seven brown foxes " * 6
    setting, other = {"helpful": 0.31, "harmless": 0.62}, {"helpful": 0.31, "harmless": 0.63}
    first, again, elsewhere = (complete(etas, prompt=prompt) for etas in (setting, setting, other))
    assert [cached(first), cached(elsewhere)] == [0, 0]
    assert cached(again) >= 128
    assert tokens(again) == tokens(first)
    # A caller's own salt divides further, and never joins two settings.
    salted = [complete(etas, prompt=prompt, extra_body={"cache_salt": "mine"}) for etas in (setting, other, setting)]
    assert [cached(answer) > 0 for answer in salted] == [False, False, True]
    ids = tokenizer(prompt)["input_ids"]
    for etas, answer in zip((setting, other, setting), salted, strict=True):
        assert tokens(answer) == merged_alone(ids, etas, 24)


@pytest.mark.parametrize(
    ("xargs", "says"),
    [
        ({"preferences": '{"kind": 0.5}'}, "unknown preference 'kind'; served here: harmless, helpful"),
        (
            {"preferences": '{"harmless": -0.1}'},
            r"preference 'harmless': -0\.1 is outside the allowed range \[0, 1\]; choose a value inside it",
        ),
        (
            {"preferences": '{"helpful": 1.5}'},
            r"preference 'helpful': 1\.5 is outside the allowed range \[-1, 1\]; choose a value inside it",
        ),
        ({"preferences": '{"helpful": NaN}'}, "nan is not a finite number"),
        ({"preferences": '{"helpful": 1' + "0" * 400 + "}"}, "inf is not a finite number"),
        ({"preferences": '{"helpful": true}'}, "a JSON object of numbers in a string"),
        ({"preferences": "helpful=0.5"}, "a JSON object of numbers in a string"),
        ({"preferences": "[" * 100_000}, "a JSON object of numbers in a string"),
        ({"preferences": 0.5}, "a JSON object of numbers in a string"),
        ({"preferences": ["helpful", 0.5]}, "a JSON object of numbers in a string"),
        ({"helpful": 0.5}, "'helpful' stands beside it"),
    ],
    ids=str,
)
def test_bad_coefficients_are_refused(client, xargs, says):
    with pytest.raises(BadRequestError, match=says):
        client.completions.create(model="tiny", prompt="why", max_tokens=4, extra_body={"vllm_xargs": xargs})


def test_the_rest_of_vllms_api_works_at_any_coefficients(client, complete):
    etas = {"helpful": -0.4, "harmless": 0.9}
    alone = tokens(complete(etas))
    sampled = {"n": 3, "temperature": 1.0, "seed": 0}
    drawn, again = ([choice.token_ids for choice in complete(etas, **sampled).choices] for _ in range(2))
    assert drawn == again
    assert len({tuple(ids) for ids in drawn}) == 3
    streamed = [token for chunk in complete(etas, stream=True) for token in chunk.choices[0].token_ids]
    assert streamed == alone
    likely = complete(etas, max_tokens=1, logprobs=5).choices[0].logprobs
    assert likely.token_logprobs[0] >= max(likely.top_logprobs[0].values())
    assert tokens(complete(etas, max_tokens=1, logit_bias={str(alone[0]): -100})) != alone[:1]
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "why not?"}],
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}},
        extra_body={"vllm_xargs": {"preferences": json.dumps(etas)}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vectors": {"harmless": "harmless@production"}}, "harmless@production"),
        ({"vectors": {"harmless": "harmless@9"}}, "harmless@9"),
        ({"vectors": {"harmless": "harmless"}}, "'harmless' is not one version; it is harmless@1 now: name that"),
        ({"ranges": {"kind": {"min": 0}}}, "no vector is called kind"),
        ({"registry": "/nowhere"}, "/nowhere"),
        ({"vector": {}}, "unknown setting 'vector' (known here: registry, vectors,"),
        ({"columns": 0}, "columns"),
    ],
    ids=str,
)
def test_a_wrong_section_is_refused(change, says, section):
    with pytest.raises(InputError) as error:
        ServedVectors(parsed(section | change))
    assert says in str(error.value)


def test_a_wrong_section_ends_the_server(base_folder, section):
    """What the front finds, and what only the worker can."""
    for change, says in (
        ({"registry": "/nowhere"}, "/nowhere"),
        ({"columns": 7}, "needs 4 columns, and 3 of 7 are free"),
    ):
        words = command(base_folder, free_port(), section | change)
        done = subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode != 0
        assert says in done.stdout + done.stderr

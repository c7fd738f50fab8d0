"""The engine on vLLM, against models merged for one request alone, and against the slot engine."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from transformers import LlamaForCausalLM

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import EngineError, PromptTooLongError, Request
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import SteeredWeights
from prefvec_ray.serving.http.openai_protocol import ResponseFormat
from prefvec_ray.vectors import Full, LiveModel, LowRank, PreferenceVector, Steering

BLOCK = 128
"""tokens of a block of vLLM's cache on CPUs"""
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * 32 * 4
"""layers, keys and values, heads, numbers of a head, bytes of a number"""


def ask(prompt: tuple[int, ...], helpful: float = 0.0, harmless: float = 0.0, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "seed": 0} | sampling)
    return Request(prompt, (("harmless", harmless), ("helpful", helpful)), params)


def some_prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 300) for _ in range(length))


def tokens(pieces: list[Any]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def shared_prompts(settings: int) -> list[Request]:
    """Prompts longer than a block that begin alike, each at a setting of its own, all at once."""
    common = some_prompt(0, BLOCK + 40)
    return [
        ask(common + some_prompt(i, i % 5), 2 * i / settings - 1, 1 - 2 * (i * 7 % settings) / settings)
        for i in range(settings)
    ]


def check(requests: list[Request], outputs: list[list[Any]], alone: Any) -> None:
    for request, pieces in zip(requests, outputs, strict=True):
        truth = alone(request.prompt, dict(request.coefficients), request.max_tokens)
        assert tokens(pieces) == truth, request.coefficients
        assert pieces[-1].finish_reason == ("length" if len(truth) == request.max_tokens else "stop")


def test_64_settings_in_one_engine_each_get_what_their_own_merged_model_gives(engine, run, merged_alone):
    requests = shared_prompts(64)
    first, again = run(engine, requests), run(engine, requests)  # the second time from the prefix cache
    check(requests, first, merged_alone)
    check(requests, again, merged_alone)
    assert len({tuple(tokens(pieces)) for pieces in first}) > 32, "the settings must make a difference"


def test_the_same_where_the_cache_holds_few_of_them(make_engine, run, merged_alone):
    """Blocks are evicted and requests preempted, computed again and read from the cache, under 64 settings."""
    engine = make_engine("steered", vllm={"kv_cache_memory_bytes": 10 * BLOCK_BYTES})
    requests = [ask(r.prompt, **dict(r.coefficients), max_tokens=100) for r in shared_prompts(64)]
    check(requests, run(engine, requests), merged_alone)
    engine.close()


def test_requests_of_few_settings_share_turns(make_engine, run, merged_alone):
    engine = make_engine("merged", switch_share=0.01)
    requests = [ask(some_prompt(i, 9 + i), i % 3 - 1.0, max_tokens=12) for i in range(30)]
    check(requests, run(engine, requests), merged_alone)
    assert engine.status().merges <= 4
    engine.close()


def test_the_base_comes_back(engine, run, merged_alone):
    requests = [ask(some_prompt(3, 20)), ask(some_prompt(3, 20), 1.0, 1.0), ask(some_prompt(3, 20))]
    for request in requests:
        check([request], run(engine, [request]), merged_alone)


def test_text_log_probabilities_and_stop_strings_are_the_slot_engines(engine, run, base_folder, tokenizer, vectors):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    asked = ask(some_prompt(5, 30), 0.4, -0.6, logprobs=3, max_tokens=40)
    with Steering(model, vectors) as steering:
        slots = SlotEngine(SteeredWeights(steering), tokenizer).start()
        (expected,) = run(slots, [asked])
        (got,) = run(engine, [asked])
        text = "".join(piece.text for piece in expected)
        assert "".join(piece.text for piece in got) == text
        theirs = [entry for piece in expected for entry in piece.logprobs]
        ours = [entry for piece in got for entry in piece.logprobs]
        assert [e.chosen.text for e in ours] == [e.chosen.text for e in theirs]
        assert [e.offset for e in ours] == [e.offset for e in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert [e.logprob for e in mine.top] == pytest.approx([e.logprob for e in other.top], abs=1e-3)
        stop = text[len(text) // 2 :][:3]
        stopped = ask(asked.prompt, 0.4, -0.6, stop=stop, max_tokens=40)
        (expected,), (got,) = run(slots, [stopped]), run(engine, [stopped])
        assert "".join(p.text for p in got) == "".join(p.text for p in expected) == text[: text.find(stop)]
        assert got[-1].finish_reason == "stop"
        slots.close()


def test_bias_penalties_and_cuts_are_the_slot_engines(engine, run, base_folder, tokenizer, vectors):
    """Greedy, or with a single token to choose from: there both must agree."""
    changes: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 2.0},
        {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.7},
        {"logit_bias": {"40": 12.0, "41": 11.5}, "frequency_penalty": 0.6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "min_p": 1.0},
    ]
    requests = [ask(some_prompt(11, 25), 0.6, -0.3, max_tokens=60, **change) for change in changes]
    with Steering(LlamaForCausalLM.from_pretrained(base_folder), vectors) as steering:
        slots = SlotEngine(SteeredWeights(steering), tokenizer).start()
        expected, got = run(slots, requests), run(engine, requests)
        slots.close()
    assert [tokens(pieces) for pieces in got] == [tokens(pieces) for pieces in expected]
    assert len({tuple(tokens(pieces)) for pieces in got}) == 6, "all but the last two differ from the first"


def test_answers_of_a_schema_are_the_slot_engines(engine, run, base_folder, tokenizer, vectors):
    properties = {
        "kind": {"enum": ["fox", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    }
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    wanted = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    requests = [
        ask(some_prompt(i, 12), i / 6, -i / 3, json_schema=wanted.schema_text if i % 3 else None, max_tokens=100)
        for i in range(9)
    ]
    with Steering(LlamaForCausalLM.from_pretrained(base_folder), vectors) as steering:
        slots = SlotEngine(SteeredWeights(steering), tokenizer).start()
        expected, got = run(slots, requests), run(engine, requests)
        slots.close()
    assert [tokens(pieces) for pieces in got] == [tokens(pieces) for pieces in expected]
    for request, pieces in zip(requests, got, strict=True):
        if request.sampling.json_schema:
            jsonschema.validate(json.loads("".join(piece.text for piece in pieces)), schema)
            assert pieces[-1].finish_reason == "stop"
    sampled = ask(some_prompt(1, 12), 0.3, json_schema=wanted.schema_text, temperature=1.5, seed=4, max_tokens=100)
    (pieces,) = run(engine, [sampled])
    jsonschema.validate(json.loads("".join(piece.text for piece in pieces)), schema)
    with pytest.raises(InputError, match="the schema is not usable"):
        engine.check(ask((5,), json_schema='{"type": "nonsense"}'))


def test_a_seed_gives_its_answer_again_whatever_runs_beside_it(engine, run):
    seeded = ask(some_prompt(6, 15), 0.5, temperature=1.0, seed=7, max_tokens=30)
    others = [ask(some_prompt(i, 15), 0.5, temperature=1.0, seed=i, max_tokens=30) for i in range(8)]
    (alone,), beside = run(engine, [seeded]), run(engine, [*others, seeded])
    assert tokens(beside[-1]) == tokens(alone)
    assert len({tuple(tokens(pieces)) for pieces in beside}) == 9


@pytest.mark.parametrize("logprobs", [None, 2])
def test_an_answer_that_was_heard_in_part_goes_on_from_there(logprobs, engine, run):
    whole = ask(some_prompt(7, 18), 0.6, -0.2, max_tokens=30, logprobs=logprobs)
    ((*_, last),) = (expected,) = run(engine, [whole])
    for received in (1, 11, len(tokens(expected))):
        begun = replace(whole, resume_tokens=tuple(tokens(expected)[:received]))
        (got,) = run(engine, [begun])
        assert tokens(got) == tokens(expected)
        assert "".join(p.text for p in got) == "".join(p.text for p in expected)
        assert got[-1].finish_reason == last.finish_reason
        if received < len(tokens(expected)):
            entries = [[e for p in pieces for e in p.logprobs] for pieces in (got, expected)]
            assert [e.chosen.text for e in entries[0]] == [e.chosen.text for e in entries[1]]
            chosen = [[e.chosen.logprob for e in side] for side in entries]
            assert chosen[0] == pytest.approx(chosen[1], abs=1e-3)


def test_bad_requests_are_refused(engine, run):
    with pytest.raises(InputError, match="no tokens"):
        engine.check(ask(()))
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        engine.check(ask((10**6,)))
    with pytest.raises(PromptTooLongError, match="model's context of 512"):
        engine.check(ask(some_prompt(1, 500)))
    with pytest.raises(EngineError, match="no vector 'kind' is known here"):
        run(engine, [Request((5,), (("kind", 0.5),), SamplingParams(max_tokens=1))])


async def stream(engine: Any, request: Request) -> AsyncGenerator[Any]:
    async with contextlib.aclosing(stream_outputs(engine, [request])) as outputs:
        async for deltas in outputs:
            for _, delta in deltas:
                yield delta


def test_coefficients_that_overflow_are_told_and_the_others_go_on(engine, runner, merged_alone):
    async def both() -> list[Any]:
        async def one(request: Request) -> list[Any]:
            return [delta async for delta in stream(engine, request)]

        fine = ask(some_prompt(8, 12), 0.3)
        return await asyncio.gather(one(ask((5, 6), 1e38, 1e38)), one(fine), return_exceptions=True)

    wrong, right = runner.run(both())
    assert isinstance(wrong, InputError)
    assert "NaN or infinity" in str(wrong)
    check([ask(some_prompt(8, 12), 0.3)], [right], merged_alone)


def test_who_leaves_frees_the_place(engine, runner):
    before = engine.status()

    async def leave() -> None:
        answer = stream(engine, ask(some_prompt(9, 20), 0.9, max_tokens=400))
        await anext(answer)
        await answer.aclose()
        async with asyncio.timeout(20):
            while engine.status().running:
                await asyncio.sleep(0.05)

    runner.run(leave())
    assert engine.status().cancelled + engine.status().finished > before.cancelled + before.finished


@pytest.mark.parametrize("mode", ["steered", "merged"])
def test_vectors_change_under_running_requests(mode, make_engine, run, runner, base_folder, vectors, merged_alone):
    """A request keeps the vectors it began with; those of the new generation come from the next one."""
    named = {f"{name} 1": vector for name, vector in vectors.items()}
    turned = {f"{name} 2": _times(vector, -1.0) for name, vector in vectors.items()}
    engine = make_engine(mode, named)

    def of(generation: int, prompt: tuple[int, ...], length: int) -> Request:
        etas = ((f"harmless {generation}", 0.5), (f"helpful {generation}", 0.8))
        return Request(prompt, etas, SamplingParams(max_tokens=length, temperature=0.0))

    async def everything() -> tuple[list[Any], list[Any]]:
        long = stream(engine, of(1, some_prompt(2, 30), 300))
        began = [await anext(long)]
        await engine.change(named | turned)
        new = [delta async for delta in stream(engine, of(2, some_prompt(2, 30), 30))]
        return began + [delta async for delta in long], new

    old, new = runner.run(everything())
    assert tokens(old) == merged_alone(some_prompt(2, 30), {"harmless": 0.5, "helpful": 0.8}, 300)
    assert tokens(new) == merged_alone(some_prompt(2, 30), {"harmless": -0.5, "helpful": -0.8}, 30)
    other = vectors["helpful"].replace(base_fingerprint="blake3:" + "0" * 64)
    with pytest.raises(InputError, match="base"):
        runner.run(engine.change({"helpful 3": other}))
    check_again = run(engine, [of(2, some_prompt(2, 30), 30)])  # nothing has changed
    assert tokens(check_again[0]) == tokens(new)
    engine.close()
    with pytest.raises(EngineError):
        engine.check_alive()


def test_norms_are_steered_too_and_what_cannot_be_is_named(make_engine, run, runner, base_folder, vectors):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    info = vectors["helpful"].info
    draw = torch.Generator().manual_seed(3)
    norms = {
        name: Full(torch.randn(weight.shape, generator=draw) * 0.3)
        for name, weight in model.named_parameters()
        if name.endswith("norm.weight")
    }
    assert len(norms) == 5
    both = {"norms": PreferenceVector(info, {**vectors["helpful"].entries, **norms}), "harmless": vectors["harmless"]}
    engine = make_engine("steered", both)
    live = LiveModel(model.eval(), both)
    for eta in (0.7, -1.0):
        greedy = SamplingParams(max_tokens=24, temperature=0.0)
        request = Request(some_prompt(4, 40), (("harmless", 0.5), ("norms", eta)), greedy)
        live.set_coefficients(dict(request.coefficients))
        ids = torch.tensor([request.prompt])
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert tokens(run(engine, [request])[0]) == whole[0, 40:].tolist()
    tokens_table = LowRank(torch.randn(2, 64), torch.randn(model.config.vocab_size, 2))
    embedding = PreferenceVector(info, {"model.embed_tokens.weight": tokens_table})
    with pytest.raises(InputError, match=r"embed_tokens.weight', which cannot be steered in vLLM.*mode: merged"):
        runner.run(engine.change({"embedding": embedding}))
    engine.close()


def test_tensor_parallel_ranks_steer_their_own_parts(make_engine, run, merged_alone):
    engine = make_engine("steered", vllm={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"})
    requests = shared_prompts(12)
    check(requests, run(engine, requests), merged_alone)
    engine.close()


def test_options_that_vllm_does_not_have_are_named(make_engine):
    with pytest.raises(InputError, match=r"engine\.vllm: warp_speed: no option"):
        make_engine("steered", vllm={"warp_speed": 9})
    with pytest.raises(InputError, match=r"engine\.vllm: worker_cls: .* decided by the other settings"):
        make_engine("steered", vllm={"worker_cls": "auto"})


def test_a_killed_vllm_is_not_alive_and_fails_its_requests(make_engine, runner):
    engine = make_engine("steered")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    newest = max(int(pid) for pid in children.stdout.split() if _is_core(int(pid)))

    async def killed() -> None:
        answer = stream(engine, ask(some_prompt(9, 20), 0.9, max_tokens=400))
        await anext(answer)
        os.kill(newest, signal.SIGKILL)
        async for _ in answer:
            pass

    async def is_noticed() -> None:
        async with asyncio.timeout(20):
            while True:
                engine.check_alive()
                await asyncio.sleep(0.1)

    engine.check_alive()
    with pytest.raises(EngineError, match="vLLM failed"):
        runner.run(killed())
    with pytest.raises(EngineError):
        runner.run(is_noticed())
    engine.close()


def test_a_closed_engine_answers_nobody_and_leaves_nobody_waiting(make_engine, runner):
    engine = make_engine("steered")

    async def close_in_the_middle() -> list[Any]:
        begun, not_begun = stream(engine, ask(some_prompt(9, 20), max_tokens=400)), stream(engine, ask((5, 6)))
        await anext(begun)
        waiting = asyncio.create_task(anext(not_begun))
        await asyncio.sleep(0)
        engine.close()
        later = stream(engine, ask((7,)))
        return [*await asyncio.gather(anext(begun), waiting, anext(later), return_exceptions=True)]

    for error in runner.run(close_in_the_middle()):
        assert isinstance(error, EngineError)
        assert "closed" in str(error)


def _is_core(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm") as file:  # noqa: PTH123
            return "Engine" in file.read()
    except FileNotFoundError:
        return False


def _times(vector: PreferenceVector, by: float) -> PreferenceVector:
    entries = {n: LowRank(e.A_RI * by, e.B_OR) for n, e in vector.entries.items()}  # type: ignore[union-attr]
    return vector.replace(entries)

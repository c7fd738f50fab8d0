"""The client around vLLM, against models merged for one request alone, and against the slot engine."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from transformers import LlamaForCausalLM
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import EngineError, OutputDelta, Request
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import SteeredWeights
from prefvec_ray.serving.engines.vllm.client import REQUEST, RequestRecord
from prefvec_ray.serving.engines.vllm.section import FIELD
from prefvec_ray.serving.spending import Spending
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


def tokens(output: Any) -> list[int]:
    return list(output.token_ids)


def shared_prompts(settings: int) -> list[Request]:
    """Prompts longer than a block that begin alike, each at a setting of its own, all at once."""
    common = some_prompt(0, BLOCK + 40)
    return [
        ask(common + some_prompt(i, i % 5), 2 * i / settings - 1, 1 - 2 * (i * 7 % settings) / settings)
        for i in range(settings)
    ]


def check(requests: list[Request], outputs: list[Any], alone: Any) -> None:
    for request, output in zip(requests, outputs, strict=True):
        truth = alone(request.prompt, dict(request.coefficients), request.max_tokens)
        assert tokens(output) == truth, request.coefficients
        assert output.finish_reason == ("length" if len(truth) == request.max_tokens else "stop")


def test_64_settings_in_one_engine_each_get_what_their_own_merged_model_gives(engine, run, merged_alone):
    requests = shared_prompts(64)
    first, again = run(engine, requests), run(engine, requests)  # the second time from the prefix cache
    check(requests, first, merged_alone)
    check(requests, again, merged_alone)
    assert len({tuple(tokens(output)) for output in first}) > 32, "the settings must make a difference"


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
    assert engine.client.status().merges <= 4
    engine.close()


def test_coefficients_and_salt_of_another_hand_are_overwritten(engine, runner, merged_alone):
    request = ask(some_prompt(7, BLOCK + 20), 0.5)
    params = vllm.SamplingParams(max_tokens=24, temperature=0.0)

    async def answered(name: str, salt: str) -> Any:
        params.extra_args = {REQUEST: name, FIELD: {"harmless": -1.0}}
        prompt = {"type": "token", "prompt_token_ids": [*request.prompt], "cache_salt": salt}
        record = RequestRecord(request.coefficients, Spending())
        with engine.client.recorded(name, record):
            outputs = engine.llm.generate(prompt, params, name)
            async with contextlib.aclosing(outputs):
                (output,) = [each async for each in outputs]
        return output

    first, again = (runner.run(answered(each, each)) for each in ("first", "again"))
    for output in (first, again):
        check([request], [output.outputs[0]], merged_alone)
    assert again.num_cached_tokens >= BLOCK, "one salt, whatever was asked for"


def test_what_is_refused_has_not_failed(engine, run):
    before = engine.client.status()
    with pytest.raises(VLLMClientError):
        run(engine, [ask((10**6,))])
    after = engine.client.status()
    assert (after.failed, after.running, after.waiting) == (before.failed, 0, 0)


def test_the_base_comes_back(engine, run, merged_alone):
    requests = [ask(some_prompt(3, 20)), ask(some_prompt(3, 20), 1.0, 1.0), ask(some_prompt(3, 20))]
    for request in requests:
        check([request], run(engine, [request]), merged_alone)


@pytest.fixture(scope="module")
def slots(base_folder: Path, tokenizer: Any, vectors: dict[str, PreferenceVector]) -> Iterator[Callable[..., Any]]:
    """What the slot engine answers."""
    with Steering(LlamaForCausalLM.from_pretrained(base_folder), vectors) as steering:
        engine = SlotEngine(SteeredWeights(steering), tokenizer).start()

        async def everything(requests: list[Request]) -> list[OutputDelta]:
            answers = [OutputDelta("", ())] * len(requests)
            async for deltas in stream_outputs(engine, requests):
                for index, delta in deltas:
                    answers[index] = answers[index].followed_by(delta)
            return answers

        yield lambda requests: asyncio.run(everything(requests))
        engine.close()


def test_text_log_probabilities_and_stop_strings_are_the_slot_engines(engine, run, slots):
    asked = ask(some_prompt(5, 30), 0.4, -0.6, logprobs=3, max_tokens=40)
    (expected,), (got,) = slots([asked]), run(engine, [asked])
    assert got.text == expected.text.rstrip("\ufffd"), "vLLM leaves half characters out at the end"
    assert len(expected.logprobs) > 30
    for token, mine, other in zip(got.token_ids, got.logprobs, expected.logprobs, strict=False):
        assert mine[token].logprob == pytest.approx(other.chosen.logprob, abs=1e-3)
        top = sorted((each.logprob for each in mine.values()), reverse=True)[:3]
        assert top == pytest.approx([each.logprob for each in other.top], abs=1e-3)
    stop = expected.text[len(expected.text) // 2 :][:3]
    stopped = ask(asked.prompt, 0.4, -0.6, stop=stop, max_tokens=40)
    (expected,), (got,) = slots([stopped]), run(engine, [stopped])
    assert got.text == expected.text
    assert stop not in got.text
    assert got.finish_reason == "stop"


def test_bias_penalties_and_cuts_are_the_slot_engines(engine, run, slots):
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
    got = [tokens(output) for output in run(engine, requests)]
    assert got == [list(answer.tokens) for answer in slots(requests)]
    assert len({tuple(each) for each in got}) == 6, "all but the last two differ from the first"


def test_a_seed_gives_its_answer_again_whatever_runs_beside_it(engine, run):
    seeded = ask(some_prompt(6, 15), 0.5, temperature=1.0, seed=7, max_tokens=30)
    others = [ask(some_prompt(i, 15), 0.5, temperature=1.0, seed=i, max_tokens=30) for i in range(8)]
    (alone,), beside = run(engine, [seeded]), run(engine, [*others, seeded])
    assert tokens(beside[-1]) == tokens(alone)
    assert len({tuple(tokens(output)) for output in beside}) == 9


def test_many_answers_to_one_prompt_come_whole_or_in_parts(engine, runner):
    asked = ask(some_prompt(6, 15), 0.5, n=3, temperature=1.0, seed=5, max_tokens=20)

    async def both() -> tuple[list[Any], list[Any]]:
        whole = [output async for output in engine.answer(asked)]
        return whole, [output async for output in engine.answer(asked, output_kind=RequestOutputKind.DELTA)]

    (whole,), parts = runner.run(both())
    assert [answer.index for answer in whole.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in whole.outputs}) == 3
    for answer in whole.outputs:
        streamed = [part for output in parts for part in output.outputs if part.index == answer.index]
        assert [token for part in streamed for token in part.token_ids] == list(answer.token_ids)
        assert "".join(part.text for part in streamed) == answer.text
        assert streamed[-1].finish_reason == answer.finish_reason


def test_an_unknown_vector_is_the_engines_error(engine, run):
    with pytest.raises(EngineError, match="no vector 'kind' is known here"):
        run(engine, [Request((5,), (("kind", 0.5),), SamplingParams(max_tokens=1))])


async def stream(engine: Any, request: Request) -> AsyncGenerator[Any]:
    """Each part of the answer."""
    async with contextlib.aclosing(engine.answer(request, output_kind=RequestOutputKind.DELTA)) as outputs:
        async for output in outputs:
            yield output.outputs[0]


def streamed(parts: list[Any]) -> list[int]:
    return [token for part in parts for token in part.token_ids]


def test_coefficients_that_overflow_are_told_and_the_others_go_on(engine, runner, merged_alone):
    async def both() -> list[Any]:
        async def one(request: Request) -> list[Any]:
            return [delta async for delta in stream(engine, request)]

        fine = ask(some_prompt(8, 12), 0.3)
        return await asyncio.gather(one(ask((5, 6), 1e38, 1e38)), one(fine), return_exceptions=True)

    wrong, right = runner.run(both())
    assert isinstance(wrong, InputError)
    assert "NaN or infinity" in str(wrong)
    assert streamed(right) == merged_alone(some_prompt(8, 12), {"helpful": 0.3, "harmless": 0.0}, 24)


def test_who_leaves_frees_the_place(engine, runner):
    before = engine.client.status()

    async def leave() -> None:
        answer = stream(engine, ask(some_prompt(9, 20), 0.9, max_tokens=400))
        await anext(answer)
        await answer.aclose()
        async with asyncio.timeout(20):
            while engine.client.status().running:
                await asyncio.sleep(0.05)

    runner.run(leave())
    assert engine.client.status().cancelled + engine.client.status().finished > before.cancelled + before.finished


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
        async def answer(request: Request) -> list[Any]:
            return [part async for part in stream(engine, request)]

        long = asyncio.create_task(answer(of(1, some_prompt(2, 30), 300)))
        while not engine.client.status().running:
            await asyncio.sleep(0.01)
        await engine.client.change(named | turned)
        new = await answer(of(2, some_prompt(2, 30), 30))
        return await long, new

    old, new = runner.run(everything())
    assert streamed(old) == merged_alone(some_prompt(2, 30), {"harmless": 0.5, "helpful": 0.8}, 300)
    assert streamed(new) == merged_alone(some_prompt(2, 30), {"harmless": -0.5, "helpful": -0.8}, 30)
    other = vectors["helpful"].replace(base_fingerprint="blake3:" + "0" * 64)
    with pytest.raises(InputError, match="base"):
        runner.run(engine.client.change({"helpful 3": other}))
    check_again = run(engine, [of(2, some_prompt(2, 30), 30)])  # nothing has changed
    assert tokens(check_again[0]) == streamed(new)
    engine.close()


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
        runner.run(engine.client.change({"embedding": embedding}))
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
                await engine.llm.check_health()
                await asyncio.sleep(0.1)

    runner.run(engine.llm.check_health())
    with pytest.raises(EngineDeadError):
        runner.run(killed())
    with pytest.raises(EngineDeadError):
        runner.run(is_noticed())
    assert engine.client.status().failed == 1
    engine.close()


def _is_core(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm") as file:  # noqa: PTH123
            return "Engine" in file.read()
    except FileNotFoundError:
        return False


def _times(vector: PreferenceVector, by: float) -> PreferenceVector:
    entries = {n: LowRank(e.A_RI * by, e.B_OR) for n, e in vector.entries.items()}  # type: ignore[union-attr]
    return vector.replace(entries)

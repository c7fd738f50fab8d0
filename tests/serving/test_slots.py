"""The slot engine alone: no Ray, no HTTP. `merged_alone` is the truth that every batch must reproduce."""

import asyncio
import contextlib
import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.common.chat import end_tokens
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.base import EngineError, OutputDelta, PromptTooLongError, Request
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots import scheduler
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering, fingerprint, vector_from_state

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"

SETTINGS = [(0.0, 0.0), (0.5, -0.5), (1.0, 1.0), (-1.0, 0.3), (0.0, -1.0)]
MakeEngine = Callable[..., SlotEngine]


@pytest.fixture(params=["merged", "steered"])
def make_engine(
    request: pytest.FixtureRequest,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vectors: dict[str, PreferenceVector],
) -> Iterator[MakeEngine]:
    """Engines in both modes: every test that takes this runs twice."""
    model = LlamaForCausalLM.from_pretrained(base_folder)
    if request.param == "merged":
        live = LiveModel(model, vectors)
        yield lambda **settings: SlotEngine(MergedWeights(live), tokenizer, **settings)
    else:
        with Steering(model, vectors) as steering:
            yield lambda **settings: SlotEngine(SteeredWeights(steering), tokenizer, **settings)


def ask(
    prompt: tuple[int, ...],
    helpful: float = 0.0,
    harmless: float = 0.0,
    *,
    resume_tokens: tuple[int, ...] = (),
    caller: str = "",
    **sampling: Any,
) -> Request:
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "seed": 0} | sampling)
    coefficients = (("harmless", harmless), ("helpful", helpful))
    return Request(prompt, coefficients, params, resume_tokens=resume_tokens, caller=caller)


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 300) for _ in range(length))


def run(engine: SlotEngine, requests: list[Request]) -> list[list[Any]]:
    outputs: list[list[Any]] = [[] for _ in requests]
    for request, output in zip(requests, outputs, strict=True):
        engine.submit(request, output.append)
    while engine.step():
        pass
    return outputs


def tokens(pieces: list[OutputDelta]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def text(pieces: list[OutputDelta]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_mixed_batch_gives_every_request_what_its_own_merged_model_gives(make_engine, merged_alone):
    requests = [
        ask(random_prompt(i, length), *SETTINGS[i % len(SETTINGS)], max_tokens=1 + 7 * i % 40)
        for i, length in enumerate([1, 2, 3, 9, 30, 64, 127, 128, 129, 200] * 2)
    ]
    outputs = run(make_engine(max_batch=8), requests)
    for request, pieces in zip(requests, outputs, strict=True):
        alone = merged_alone(request.prompt, dict(request.coefficients), request.max_tokens)
        assert tokens(pieces) == alone
        assert pieces[-1].finish_reason == ("length" if len(alone) == request.max_tokens else "stop")
    assert len({tuple(tokens(pieces)) for pieces in outputs}) > 10, "the settings must make a difference"


def test_a_shared_prompt_at_many_settings_shares_nothing_else(make_engine, merged_alone):
    prompt = random_prompt(3, 150)
    requests = [ask(prompt, i / 8 - 1, 1 - i / 8) for i in range(16)]
    for request, pieces in zip(requests, run(make_engine(), requests), strict=True):
        assert tokens(pieces) == merged_alone(prompt, dict(request.coefficients), 24)


def test_joining_in_the_middle_of_others_changes_nobodys_answer(make_engine, merged_alone):
    engine = make_engine(max_batch=4)
    outputs: list[list[OutputDelta]] = []
    requests = [ask(random_prompt(i, 5 + 20 * i), *SETTINGS[i % 3]) for i in range(6)]
    for request in requests:
        outputs.append([])
        engine.submit(request, outputs[-1].append)
        for _ in range(5):
            engine.step()
    while engine.step():
        pass
    for request, pieces in zip(requests, outputs, strict=True):
        assert tokens(pieces) == merged_alone(request.prompt, dict(request.coefficients), 24)


def test_long_prompts_are_computed_in_chunks_and_change_nobodys_answer(make_engine, merged_alone):
    requests = [
        ask(random_prompt(seed, length), *SETTINGS[seed % len(SETTINGS)])
        for seed, length in enumerate([300, 7, 65, 64, 400, 20, 129, 63, 210, 470])
    ]
    outputs = run(make_engine(prefill_tokens=64, max_batch=6), requests)
    for request, output in zip(requests, outputs, strict=True):
        assert tokens(output) == merged_alone(request.prompt, dict(request.coefficients), request.max_tokens)


def test_running_answers_go_on_between_the_chunks_of_a_long_prompt(make_engine):
    engine = make_engine(prefill_tokens=16)
    running: list[Any] = []
    late: list[Any] = []
    engine.submit(ask(random_prompt(1, 8), max_tokens=200, temperature=2.0), running.append)
    engine.step()
    engine.submit(ask(random_prompt(2, 160)), late.append)
    received = []
    while not late:
        assert engine.step()
        received.append(engine.status().tokens)  # not those of pieces: half a character is held back
    assert received[-1] > 4, "one chunk, one token, not the whole prompt at once"
    assert all(after - before <= 2 for before, after in pairwise(received))


def test_a_long_prompt_can_be_cancelled_halfway(make_engine, merged_alone):
    engine = make_engine(prefill_tokens=16)
    gone: list[OutputDelta] = []
    kept: list[OutputDelta] = []
    scheduled = engine.submit(ask(random_prompt(1, 300)), gone.append)
    request = ask(random_prompt(2, 200), 0.5)
    engine.submit(request, kept.append)
    for _ in range(3):
        engine.step()
    scheduled.cancel()
    while engine.step():
        pass
    assert gone == []
    assert tokens(kept) == merged_alone(request.prompt, dict(request.coefficients), request.max_tokens)
    assert (engine.status().running, engine.status().cancelled) == (0, 1)


def test_the_mask_of_a_long_prompt_does_not_grow_with_its_square(make_engine, monkeypatch):
    engine = make_engine(prefill_tokens=16)
    masks: list[int] = []
    forward = engine._forward

    def watched(*args: Any) -> Any:
        masks.extend(mask.numel() for mask in args[3].values())
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", watched)
    for length in (60, 120, 240, 480):
        masks.clear()
        run(engine, [ask(random_prompt(1, length), max_tokens=1)])
        assert max(masks) <= max(4 * 16**2, length), length


def test_one_callers_prompts_hold_up_nobody_elses_tokens(make_engine, merged_alone, monkeypatch):
    """On a machine where any pass takes too long: with another caller busy, prompts go in the smallest passes."""
    monkeypatch.setattr(scheduler, "PASS_SECONDS", 0.0)
    engine = make_engine(prefill_tokens=512)
    alone: list[int] = []
    beside: list[int] = []
    forward = engine._forward

    def watched(rows: list[Any], ids: torch.Tensor, *args: Any) -> Any:
        (beside if engine._scheduler._shares.busy > 1 else alone).append(ids.numel())
        return forward(rows, ids, *args)

    monkeypatch.setattr(engine, "_forward", watched)
    crowd = [dataclasses.replace(ask(random_prompt(i, 120), 0.5), caller="crowd") for i in range(3)]
    assert all(len(tokens(output)) == 24 for output in run(engine, crowd))
    assert max(alone) == 360, "alone, a caller's prompts are computed together"
    assert not beside
    other = dataclasses.replace(ask(random_prompt(7, 150), 0.5, max_tokens=40), caller="other")
    requests = [*crowd, other]
    for request, output in zip(requests, run(engine, requests), strict=True):
        assert tokens(output) == merged_alone(request.prompt, dict(request.coefficients), request.max_tokens)
    assert max(beside) == scheduler.LEAST_PROMPT_TOKENS


def test_of_long_prompts_that_of_the_caller_that_had_least_is_next(make_engine):
    engine = make_engine(prefill_tokens=16, max_batch=8)
    ended: list[str] = []
    for number, caller in enumerate(["crowd"] * 4 + ["other"]):
        request = dataclasses.replace(ask(random_prompt(number, 64), 0.5, max_tokens=1), caller=caller)
        engine.submit(request, lambda _, caller=caller: ended.append(caller))
        engine.step()  # the crowd has had something when the other comes
    while engine.step():
        pass
    assert ended.index("other") < 4, "not behind all of the crowd's"


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(make_engine):
    seeded = ask(random_prompt(1, 12), 0.5, temperature=1.0, seed=7)
    nucleus = ask(random_prompt(1, 12), 0.5, temperature=0.9, top_p=0.6, seed=7)
    crowd = [ask(random_prompt(i, 3 * i), *SETTINGS[i % 5], temperature=1.3, seed=i) for i in range(1, 9)]
    alone = [run(make_engine(), [request])[0] for request in (seeded, nucleus)]
    among = run(make_engine(), [*crowd[:4], seeded, *crowd[4:], nucleus])
    assert tokens(among[4]) == tokens(alone[0])
    assert tokens(among[-1]) == tokens(alone[1])
    other = run(make_engine(), [ask(random_prompt(1, 12), 0.5, temperature=1.0, seed=8)])[0]
    assert tokens(other) != tokens(alone[0])


def test_an_answer_goes_on_from_what_was_heard_of_it(make_engine, merged_alone):
    prompt, received = random_prompt(5, 20), random_prompt(6, 5)
    engine = make_engine(max_batch=4)
    greedy, other = run(engine, [ask(prompt, 0.5, resume_tokens=received, logprobs=0), ask(prompt, 0.5)])
    assert tokens(greedy) == [*received, *merged_alone([*prompt, *received], {"helpful": 0.5}, 19)]
    assert tokens(other) == merged_alone(prompt, {"helpful": 0.5}, 24)
    assert next(said.chosen.logprob for piece in greedy for said in piece.logprobs) < -1, "not what the model would say"
    (whole,) = run(engine, [ask(prompt, temperature=1.0, seed=7)])
    (again,) = run(engine, [ask(prompt, temperature=1.0, seed=7, resume_tokens=tuple(tokens(whole)[:9]))])
    assert tokens(again) == tokens(whole), "what is drawn after it is what would have been"


def test_pieces_join_to_the_decoded_answer(make_engine, tokenizer):
    request = ask(tuple(tokenizer("the quick brown").input_ids), 1.0, temperature=1.0, max_tokens=80)
    (pieces,) = run(make_engine(), [request])
    words = [token for token in tokens(pieces) if token != tokenizer.eos_token_id]
    assert len(pieces) > 5
    assert text(pieces) == tokenizer.decode(words, skip_special_tokens=True)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@pytest.mark.parametrize("asked", [{}, {"stop": ["never in there"], "logprobs": 2}])
def test_an_interval_joins_parts_and_changes_nothing_in_them(make_engine, asked):
    """The first part comes at once, the last with what is left."""
    request = ask(random_prompt(4, 10), 1.0, max_tokens=43, temperature=1.0, **asked)
    (single,), (joined,) = (run(make_engine(stream_interval=interval), [request]) for interval in (1, 8))
    assert text(joined) == text(single)
    assert tokens(joined) == tokens(single)
    logprobs = [[each for piece in pieces for each in piece.logprobs] for pieces in (joined, single)]
    assert logprobs[0] == logprobs[1]
    assert bool(logprobs[0]) == bool(asked)
    assert len(joined[0].tokens) == len(single[0].tokens)
    assert all(len(piece.tokens) >= 8 for piece in joined[1:-1])
    assert len(joined) <= 2 + 42 // 8
    assert joined[-1].finish_reason == single[-1].finish_reason


@pytest.mark.parametrize("length", [1, 3, 6])
def test_an_answer_ends_before_its_stop_string(make_engine, length):
    request = ask(random_prompt(2, 10), 0.5, max_tokens=40)
    whole = text(run(make_engine(), [request])[0])
    stop = whole[len(whole) // 2 :][:length]
    stopped = ask(random_prompt(2, 10), 0.5, max_tokens=40, stop=["never in there", stop])
    (pieces,) = run(make_engine(), [stopped])
    assert text(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_a_cancelled_request_frees_its_row_and_disturbs_nobody(make_engine, merged_alone):
    engine = make_engine(max_batch=2)
    requests = [ask(random_prompt(i, 20), 1.0, max_tokens=30) for i in range(3)]
    outputs: list[list[Any]] = [[] for _ in requests]
    scheduled = [engine.submit(r, o.append) for r, o in zip(requests, outputs, strict=True)]
    for _ in range(4):
        engine.step()
    assert (engine.status().running, engine.status().waiting) == (2, 1)
    scheduled[0].cancel()
    seen = len(outputs[0])
    engine.step()
    assert (engine.status().running, engine.status().waiting) == (2, 0), "the waiting one has taken the row"
    while engine.step():
        pass
    assert len(outputs[0]) == seen
    for request, pieces in zip(requests[1:], outputs[1:], strict=True):
        assert tokens(pieces) == merged_alone(request.prompt, dict(request.coefficients), 30)
    status = engine.status()
    assert (status.finished, status.cancelled, status.running) == (2, 1, 0)


def test_a_waiting_request_can_be_cancelled(make_engine):
    engine = make_engine(max_batch=1)
    output: list[OutputDelta] = []
    engine.submit(ask(random_prompt(1, 5)), output.append)
    engine.submit(ask(random_prompt(2, 5)), pytest.fail).cancel()
    while engine.step():
        pass
    assert output[-1].finish_reason
    assert engine.status().cancelled == 1


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (ask(()), InputError, "no tokens"),
        (ask((1, 99999)), InputError, "vocabulary"),
        (ask(random_prompt(1, 500), max_tokens=13), PromptTooLongError, "context of 512"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(make_engine, request_, error, says):
    with pytest.raises(error, match=says):
        make_engine().submit(request_, pytest.fail)


def test_prompt_and_answer_may_fill_the_context(make_engine, merged_alone):
    prompt = random_prompt(5, 490)
    (pieces,) = run(make_engine(), [ask(prompt, 0.5, max_tokens=22)])
    assert tokens(pieces) == merged_alone(prompt, {"helpful": 0.5}, 22)


@pytest.fixture
def merged(base_folder: Path, tokenizer: PreTrainedTokenizerBase, vectors: dict[str, PreferenceVector]) -> MakeEngine:
    live = LiveModel(LlamaForCausalLM.from_pretrained(base_folder), vectors)
    return lambda **settings: SlotEngine(MergedWeights(live), tokenizer, **settings)


def test_weights_are_rewritten_only_when_the_setting_changes(merged):
    engine = merged()
    run(engine, [ask(random_prompt(i, 9), 0.5, 0.5) for i in range(6)])
    run(engine, [ask(random_prompt(i, 9), 0.5, 0.5) for i in range(3)])
    assert engine.status().merges == 1


def test_a_hot_setting_does_not_starve_a_cold_one(merged):
    engine = merged(max_batch=4, switch_share=1.0)
    order: list[str] = []

    def ended(name: str) -> Callable[[OutputDelta], None]:
        return lambda piece: order.append(name) if piece.finish_reason else None

    for i in range(12):
        hot = ask(random_prompt(i, 9), 1.0, max_tokens=40)
        engine.submit(hot, ended(f"hot {i}"))
        if i == 1:
            cold = ask(random_prompt(99, 9), -1.0, max_tokens=10)
            engine.submit(cold, ended("cold"))
    while engine.step():
        pass
    assert len(order) == 13
    assert order.index("cold") <= 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second after the one before, so that shares do not depend on the machine."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))


def test_a_crowd_of_one_callers_requests_delays_another_by_one_free_row(make_engine, merged_alone, clock):
    engine, ended = make_engine(max_batch=4), []
    asked = [ask(random_prompt(i, 9), 0.5, max_tokens=16, caller="crowd") for i in range(12)]
    asked.append(ask(random_prompt(99, 9), 1.0, -0.5, max_tokens=16, caller="late"))
    outputs: list[list[Any]] = [[] for _ in asked]

    def submit(number: int) -> None:
        def emit(piece: Any) -> None:
            outputs[number].append(piece)
            ended.extend([number] if piece.finish_reason else [])

        engine.submit(asked[number], emit)

    for number in range(12):
        submit(number)
    for _ in range(3):
        engine.step()
    submit(12)
    while engine.step():
        pass
    assert len(ended) == 13
    assert ended.index(12) < 8, "before all of the crowd that did not run when it came"
    for request, output in zip(asked, outputs, strict=True):
        assert tokens(output) == merged_alone(request.prompt, dict(request.coefficients), 16)


@pytest.mark.parametrize(("caller", "most"), [("somebody", 7), ("", 8)])
def test_a_caller_that_is_named_leaves_rows_to_others(make_engine, caller, most):
    engine = make_engine(max_batch=8)
    for i in range(12):
        engine.submit(ask(random_prompt(i, 9), caller=caller), [].append)
    engine.step()
    assert (engine.status().running, engine.status().waiting) == (most, 12 - most)
    engine.submit(ask(random_prompt(50, 9), caller="another"), [].append)
    engine.step()
    assert engine.status().running == 8
    engine.close()


def test_four_settings_of_one_caller_have_one_callers_share_of_the_turns(merged, clock):
    engine = merged(switch_share=1e9)  # a turn is one step
    received: list[OutputDelta] = []
    for i in range(4):
        engine.submit(ask(random_prompt(i, 9), 0.1 * i, max_tokens=60, caller="crowd"), [].append)
    for _ in range(10):
        engine.step()
    engine.submit(ask(random_prompt(99, 9), 1.0, max_tokens=8, caller="late"), received.append)
    steps = 0
    while not received or received[-1].finish_reason is None:
        assert engine.step()
        steps += 1
    assert steps <= 20, "every second turn, not every fifth"
    engine.close()


def test_waiting_requests_of_one_setting_run_together(merged, merged_alone):
    """Two settings by turns, and room for four requests: they are grouped, and nobody waits for ever."""
    engine, settings = merged(max_batch=4, switch_share=1.0), [(0.5, 0.0), (-0.5, 0.5)]
    asked = [ask(random_prompt(i, 9), *settings[i % 2], max_tokens=8) for i in range(16)]
    order: list[int] = []
    outputs: list[list[Any]] = [[] for _ in asked]
    for i, (request, output) in enumerate(zip(asked, outputs, strict=True)):

        def emit(piece: OutputDelta, i: int = i, output: list[Any] = output) -> None:
            output.append(piece)
            order.extend([i] if piece.finish_reason else [])

        engine.submit(request, emit)
    while engine.step():
        pass
    assert all(abs(order.index(i) - i) <= 8 for i in range(16)), order
    for request, output in zip(asked, outputs, strict=True):
        assert tokens(output) == merged_alone(request.prompt, dict(request.coefficients), 8)


def test_coefficients_that_overflow_the_sums_fail_alone(merged, merged_alone):
    engine = merged()
    outputs = run(engine, [ask(random_prompt(1, 9), 1e36), ask(random_prompt(1, 9), 0.5)])
    assert isinstance(outputs[0][-1], InputError)
    assert "NaN or infinity" in str(outputs[0][-1])
    assert (engine.status().failed, engine.status().finished) == (1, 1)
    assert tokens(outputs[1]) == merged_alone(random_prompt(1, 9), {"helpful": 0.5}, 24)


def test_coefficients_that_overflow_a_weight_fail_alone(base_folder, tokenizer, vectors):
    half = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float16)
    live = LiveModel(half, vectors, base_fingerprint=fingerprint(base_folder))
    engine = SlotEngine(MergedWeights(live), tokenizer)
    outputs = run(engine, [ask(random_prompt(1, 9), 1e8), ask(random_prompt(1, 9), 0.5)])
    assert isinstance(outputs[0][-1], InputError)
    assert outputs[1][-1].finish_reason
    assert (engine.status().failed, engine.status().finished) == (1, 1)


def test_a_closed_engine_answers_nobody_and_leaves_nobody_waiting(merged):
    engine = merged()
    output: list[OutputDelta] = []
    engine.submit(ask(random_prompt(1, 9)), output.append)
    engine.step()
    engine.close()
    assert isinstance(output[-1], EngineError)
    with pytest.raises(EngineError):
        engine.submit(ask(random_prompt(1, 9)), pytest.fail)


def test_streams_run_side_by_side_and_closing_one_stops_it(merged, merged_alone):
    engine = merged().start()

    async def read(seed: int) -> list[int]:
        outputs = stream_outputs(engine, [ask(random_prompt(seed, 9), 0.5)])
        return tokens([piece async for deltas in outputs for _, piece in deltas])

    async def leave_early() -> None:
        async with contextlib.aclosing(stream_outputs(engine, [ask(random_prompt(0, 9), -1.0, max_tokens=400)])) as out:
            await anext(out)

    async def all_of_them() -> list[Any]:
        answers = await asyncio.gather(leave_early(), *(read(seed) for seed in range(1, 5)))
        while engine.status().cancelled == 0:
            await asyncio.sleep(0.01)
        return answers[1:]

    try:
        answers = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    finally:
        engine.close()
    for seed, answer in enumerate(answers, start=1):
        assert answer == merged_alone(random_prompt(seed, 9), {"helpful": 0.5}, 24)
    assert engine.status().running == 0


WINDOW = 24
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {"head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": MIXED},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": MIXED},
    "phi3": {"pad_token_id": 0, "sliding_window": WINDOW},
    "olmo3": {"sliding_window": WINDOW, "layer_types": MIXED},
    "cohere2": {"sliding_window": WINDOW, "layer_types": MIXED},
}


@pytest.mark.parametrize("prefill_tokens", [2048, 32])
@pytest.mark.parametrize("mode", ["merged", "steered"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures_give_what_generate_gives(kind, mode, prefill_tokens, tokenizer):
    """Grouped heads, sliding windows, soft caps, fused projections: each model's own attention over the slots. Answers
    and prompts are several windows long, and rows of all lengths are in one batch, at two settings."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=2,
        **ARCHITECTURES[kind],
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    truth = copy.deepcopy(model)
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = model.get_parameter(name).shape
    delta = {name: 0.1 * torch.randn(rows, 4) @ torch.randn(4, columns)}
    vectors = {"odd": vector_from_state(delta, preference="odd", base_fingerprint="random")}
    requests = [
        Request(random_prompt(i, length), (("odd", eta),), SamplingParams(max_tokens=most, temperature=0.0))
        for i, (length, most, eta) in enumerate(
            [(1, 60, 0.0), (5, 12, 1.0), (23, 12, 1.0), (24, 30, 0.0), (25, 3, 0.0), (40, 12, 1.0), (150, 80, 1.0)]
        )
    ]
    if mode == "merged":
        weights = MergedWeights(LiveModel(model, vectors, base_fingerprint="random"))
        outputs = run(SlotEngine(weights, tokenizer, prefill_tokens=prefill_tokens), requests)
    else:
        with Steering(model, vectors, rank=4, base_fingerprint="random") as steering:
            outputs = run(SlotEngine(SteeredWeights(steering), tokenizer, prefill_tokens=prefill_tokens), requests)
    live, longest = LiveModel(truth, vectors, base_fingerprint="random"), 0
    for request, pieces in zip(requests, outputs, strict=True):
        live.set_coefficients(dict(request.coefficients))
        ids = torch.tensor([request.prompt])
        alone = truth.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            eos_token_id=sorted(end_tokens(truth.generation_config, tokenizer)),
        )
        answer = alone[0, len(request.prompt) :].tolist()
        assert tokens(pieces) == answer
        longest = max(longest, len(request.prompt) + len(answer))
    assert longest > 150, "rows must outgrow their window"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not on this machine")
def test_a_real_model_at_two_settings():
    """A trained Llama, with a tokenizer that writes spaces in front of words."""
    words = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    name = "model.layers.0.mlp.down_proj.weight"
    delta = {name: torch.randn(model.get_parameter(name).shape, generator=torch.Generator().manual_seed(0))}
    vector = vector_from_state(delta, preference="odd", base_fingerprint=fingerprint(STORIES))
    live = LiveModel(model, {"odd": vector})
    prompt = tuple(words("Once upon a time").input_ids)
    greedy = SamplingParams(max_tokens=30, temperature=0.0)
    asked = [Request(prompt, (("odd", eta),), greedy) for eta in (0.0, 0.3)]
    told = run(SlotEngine(MergedWeights(live), words), asked)
    assert text(told[0]).startswith(", there was")
    assert text(told[0]) != text(told[1])
    for request, pieces in zip(asked, told, strict=True):
        live.set_coefficients(dict(request.coefficients))
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        assert tokens(pieces) == alone[0, len(prompt) :].tolist()


def test_models_without_keys_and_values_by_position_are_refused(tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(InputError, match="mamba"):
        SlotEngine(MergedWeights(LiveModel(model, {})), tokenizer)

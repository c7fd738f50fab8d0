"""Who waits for whom in the slot engine, on a clock that only its work moves, each kind by a fixed time."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots import scheduler
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, Steering

SWITCH, PASS, PROMPT_TOKEN = 0.003, 0.003, 0.0001
"""seconds for rewriting the weights, for a pass of the model, and for each token of a prompt in it"""
TURN, EARLY_TURN = SWITCH / 0.1, SWITCH / scheduler.EARLY_SHARE


class TimedEngine:
    """A slot engine on a clock of its own."""

    def __init__(self, make: Callable[[], SlotEngine], monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.received: dict[str, list[float]] = {}
        """request -> when it had each token"""
        self.turns: list[tuple[Any, float]] = []
        """setting and seconds of each time that weights were in use, rewriting included"""
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.engine = engine = make()
        forward = engine._forward

        def timed_forward(rows: list[Any], ids: Any, *args: Any) -> Any:
            began = self.now
            logits = forward(rows, ids, *args)
            self.now += PASS + PROMPT_TOKEN * (ids.numel() if ids.shape[1] > 1 else 0)
            setting, took = rows[0].request.coefficients, self.now - began
            if self.turns and self.turns[-1][0] == setting:
                took += self.turns.pop()[1]
            self.turns.append((setting, took))
            return logits

        monkeypatch.setattr(engine, "_forward", timed_forward)
        if isinstance(engine._weights, MergedWeights):
            live = engine._weights.live
            rewrite = live.set_coefficients

            def timed_rewrite(coefficients: Any) -> None:
                rewrite(coefficients)
                self.now += SWITCH

            monkeypatch.setattr(live, "set_coefficients", timed_rewrite)

    def submit(
        self,
        name: str,
        eta: float = 0.0,
        *,
        prompt: int = 3,
        tokens: int = 4,
        ended: Callable[[], None] | None = None,
    ) -> None:
        """`name` is the caller's, and after a slash what tells its requests apart."""
        sampling = SamplingParams(max_tokens=tokens, logit_bias={"70": 100})  # a letter again and again
        coefficients = (("harmless", 0.0), ("helpful", eta))
        request = Request((5,) * prompt, coefficients, sampling, caller=name.partition("/")[0])
        self.received[name] = []

        def emit(delta: Any) -> None:
            assert isinstance(delta, OutputDelta)
            self.received[name] += [self.now] * len(delta.tokens)
            if delta.finish_reason and ended:
                ended()

        self.engine.submit(request, emit)

    def run(self, until: Callable[[], Any]) -> None:
        while not until():
            assert self.engine.step()

    def run_to(self, moment: float) -> None:
        self.run(lambda: self.now >= moment)

    def run_to_first_token(self, name: str) -> None:
        self.run(lambda: self.received[name])


@pytest.fixture(params=["merged", "steered"])
def timed(
    request: pytest.FixtureRequest, base_folder: Path, tokenizer: Any, vectors: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], TimedEngine]:
    model = LlamaForCausalLM.from_pretrained(base_folder)
    weights = (
        MergedWeights(LiveModel(model, vectors))
        if request.param == "merged"
        else SteeredWeights(Steering(model, vectors))
    )
    return lambda: TimedEngine(lambda: SlotEngine(weights, tokenizer, max_batch=8), monkeypatch)


merged_only = pytest.mark.parametrize("timed", ["merged"], indirect=True)


def first_tokens_beside(engine: TimedEngine, prompt: int = 3, tokens: int = 4, apart: float = 0.0) -> list[float]:
    """The waits of another caller for its first token, who asks every 41 ms, beside four requests of a hostile one,
    whose settings are so far apart."""
    engine.submit("other", 0.5)
    number = 0

    def attack() -> None:
        nonlocal number
        number += 1
        engine.submit(f"hostile/{number}", apart * number, prompt=prompt, tokens=tokens, ended=attack)

    for _ in range(4):
        attack()
    engine.run_to(0.5)
    waits = []
    for each in range(12):
        due = max(engine.now, 0.5 + 0.041 * each)
        engine.run_to(due)
        name = f"other/{each}"
        engine.submit(name, 0.5)
        engine.run_to_first_token(name)
        waits.append(engine.received[name][0] - due)
    return waits


@pytest.mark.parametrize(
    "hostile",
    [
        {"prompt": 200, "tokens": 32},
        {"prompt": 200, "tokens": 32, "apart": 0.001},
        {"tokens": 1, "apart": 0.001},
        {"tokens": 400, "apart": 0.001},
        {"prompt": 500, "tokens": 1},
    ],
    ids=["long prompts", "long prompts, a setting each", "short answers", "long answers", "the longest prompts"],
)
def test_a_hostile_caller_delays_a_first_token_by_one_pass_and_an_early_turn(timed, hostile):
    waits = first_tokens_beside(timed(), **hostile)
    longest_pass = scheduler.PASS_SECONDS + 2 * PASS
    assert max(waits) <= EARLY_TURN + longest_pass + 2 * (SWITCH + PASS)


@merged_only
def test_a_turn_ends_early_for_the_first_token_of_a_caller_that_had_less(timed):
    engine = timed()
    engine.submit("busy", 0.0, tokens=400)
    engine.run_to(0.2)
    engine.submit("late", 0.5)
    engine.run_to_first_token("late")
    engine.run(lambda: engine.engine.status().running == 1)
    engine.turns.clear()
    engine.run(lambda: engine.turns)  # a turn of the busy one has begun
    began = engine.now - engine.turns[0][1]
    engine.submit("late/again", 0.5)
    engine.run_to_first_token("late/again")
    assert engine.now - began == pytest.approx(EARLY_TURN + SWITCH + PASS + 3 * PROMPT_TOKEN)


@merged_only
def test_nobody_cuts_the_others_turns_to_less_than_an_early_one(timed):
    """Short answers of three callers, who each had less than the busy one, come without a pause."""
    engine, number = timed(), 0
    engine.submit("busy", 0.0, tokens=400)
    engine.run_to(0.2)

    def another() -> None:
        nonlocal number
        number += 1
        engine.submit(f"late-{number % 3}/{number}", 0.5 + number / 1000, tokens=1, ended=another)

    for _ in range(3):
        another()
    engine.turns.clear()
    engine.run_to(1)
    turns = [seconds for (_, (_, eta)), seconds in engine.turns[1:-1] if eta == 0]
    assert len(turns) > 10
    assert min(turns) >= EARLY_TURN - 1e-9


@merged_only
def test_a_caller_that_had_its_share_waits_for_the_end_of_a_turn(timed):
    engine = timed()
    for name, eta in (("one", 0.0), ("two", 0.5)):
        engine.submit(name, eta, tokens=400)
    engine.run_to(0.3)
    engine.turns.clear()
    engine.run(lambda: len(engine.turns) > 1 and engine.turns[-1][0] == (("harmless", 0.0), ("helpful", 0.5)))
    began = engine.now - engine.turns[-1][1]
    engine.submit("one/again", 1.0)
    engine.run_to_first_token("one/again")
    assert engine.now - began >= TURN


def flood(engine: TimedEngine) -> Callable[[], int]:
    """One caller with four requests of one token under way at all times. The function says how many have begun."""
    number = 0

    def another() -> None:
        nonlocal number
        number += 1
        engine.submit(f"flood/{number}", 0.5, tokens=1, ended=another)

    for _ in range(4):
        another()
    return lambda: number


def test_answers_go_on_beside_a_flood_of_short_ones(timed):
    engine = timed()
    begun = flood(engine)
    engine.run_to(0.1)
    engine.submit("other", 0.5, tokens=40)
    before = begun()
    engine.run(lambda: len(engine.received["other"]) == 40)
    assert begun() - before <= 4 * 41, "between two of its tokens each of the flood's four at most"


def test_a_long_prompt_is_computed_beside_a_flood_of_short_ones(timed):
    engine = timed()
    flood(engine)
    engine.run_to(0.1)
    engine.submit("other", 0.5, prompt=480, tokens=1)
    began = engine.now
    engine.run_to_first_token("other")
    assert engine.now - began < 0.3, "about half of the time is its own"


def test_prompts_stay_in_short_passes_while_the_others_only_pause(timed, monkeypatch):
    engine, longest = timed(), []
    forward = engine.engine._forward

    def watched(rows: list[Any], ids: Any, *args: Any) -> Any:
        longest.append(ids.numel())
        return forward(rows, ids, *args)

    monkeypatch.setattr(engine.engine, "_forward", watched)

    def burst(name: str) -> int:
        """Most prompt tokens of a pass."""
        longest.clear()
        for each in range(4):
            engine.submit(f"flood/{name} {each}", 0.5, prompt=300, tokens=1)
        engine.run(lambda: not engine.engine.status().running + engine.engine.status().waiting)
        return max(longest)

    assert burst("alone") == 1200
    engine.submit("flood", 0.5, tokens=20)
    engine.submit("other", 0.5, tokens=1)
    engine.run(lambda: engine.received["flood"] and engine.received["other"])
    engine.run(lambda: not engine.engine.status().running)
    assert burst("in a pause") * PROMPT_TOKEN <= scheduler.PASS_SECONDS
    engine.now += scheduler.ALONE_SECONDS + 1
    assert burst("alone again") == 1200

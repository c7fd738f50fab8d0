"""Requests go where their coefficients are merged, as long as there is room."""

import random
from collections.abc import Callable

from prefvec_ray.serving.release.routing import OPENING, ROOM, opening_of, preferred


def served(
    settings: list[int], replicas: int, running: int, choose: Callable[[int, dict[str, int]], str]
) -> tuple[int, int]:
    """(changes of weights, most requests at one replica) when `running` requests are always under way and every
    replica keeps the last 4 settings that it had in turns."""
    loads = dict.fromkeys((f"r{i}" for i in range(replicas)), 0)
    held: dict[str, list[int]] = {name: [] for name in loads}
    ends: list[str] = []
    changes = most = 0
    for setting in settings:
        name = choose(setting, loads)
        if setting not in held[name]:
            changes += 1
        held[name] = [setting, *(s for s in held[name] if s != setting)][:4]
        loads[name] += 1
        ends.append(name)
        most = max(most, loads[name])
        if len(ends) > running:
            loads[ends.pop(0)] -= 1
    return changes, most


def test_a_setting_keeps_its_replica_and_the_settings_spread():
    loads = dict.fromkeys(("a", "b", "c", "d"), 0)
    first = {setting: preferred(setting, loads)[0] for setting in range(200)}
    assert {setting: preferred(setting, loads)[0] for setting in range(200)} == first
    assert all(30 < list(first.values()).count(name) < 70 for name in loads)


def test_only_the_settings_of_a_lost_replica_move():
    loads = dict.fromkeys(("a", "b", "c", "d"), 0)
    fewer = {name: 0 for name in loads if name != "c"}
    for setting in range(100):
        before = preferred(setting, loads)
        assert preferred(setting, fewer) == [name for name in before if name != "c"]


def test_a_hot_setting_takes_as_many_replicas_as_it_needs():
    hot = [0] * 400
    changes, most = served(hot, replicas=4, running=32, choose=lambda s, loads: preferred(s, loads)[0])
    assert most <= ROOM * 33 / 4 + 1
    assert changes <= 4, "each replica merges it once"


def test_full_replicas_are_tried_last_the_least_loaded_first():
    order = preferred("x", {"a": 9, "b": 0, "c": 8, "d": 0})
    assert set(order[:2]) == {"b", "d"}
    assert order[2:] == ["c", "a"]
    assert preferred("x", {}) == []


def test_far_fewer_changes_of_weights_than_by_chance():
    draw = random.Random(0)
    settings = [draw.randrange(12) for _ in range(2000)]
    mine, most = served(settings, 4, 32, lambda s, loads: preferred(s, loads)[0])
    chance, _ = served(settings, 4, 32, lambda s, loads: min(draw.sample(sorted(loads), 2), key=loads.__getitem__))
    assert mine * 2 < chance
    assert most <= ROOM * 33 / 4 + 1


def test_turns_of_a_conversation_begin_alike_and_other_prompts_do_not():
    system = {"role": "system", "content": "You are a wizard."}
    turns = [[system, {"role": "user", "content": f"question {turn}"}] for turn in range(3)]
    assert {opening_of({"messages": messages}) for messages in turns} == {"You are a wizard."}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]}
    assert opening_of(parts) == opening_of(parts) != opening_of({"messages": turns[0]})
    few_shot = "an example. " * 200
    assert opening_of({"prompt": few_shot + "a"}) == opening_of({"prompt": few_shot + "b"})
    assert opening_of({"prompt": "a"}) != opening_of({"prompt": "b"})
    assert opening_of({"prompt": ["a", "b"]}) == opening_of({"prompt": "a"})
    ids = list(range(OPENING))
    assert opening_of({"prompt": [*ids, 5]}) == opening_of({"prompt": [[*ids, 6], [7]]}) != opening_of({"prompt": [1]})
    assert opening_of({"messages": [{"role": "assistant", "content": None}]}) == "[]"
    assert opening_of({}) == ""

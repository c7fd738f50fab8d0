"""A search in which results come back in any order: made-up scores, no cluster."""

import random
from dataclasses import replace
from typing import Any

import pytest

from prefvec_ray.search import Explorer, Tried
from prefvec_ray.search.explore import Proposal
from prefvec_ray.search.ordered import Ordered
from prefvec_ray.search.result import FailedTrial
from tests.search.test_explore import RUNGS, World, explore, opened, world  # noqa: F401


def carry_out(
    world: World,  # noqa: F811
    options: dict[str, Any],
    *,
    processes: int,
    seed: int,
    fail: int | None = None,
) -> Explorer:
    """Four proposals under way on `processes` processes, any of which may finish next."""
    ordered, chance = Ordered(explore(**options), 4), random.Random(seed)
    flying: list[Proposal] = []
    while True:
        while len(flying) < 4 and (proposal := ordered.propose()):
            flying.append(proposal)
        if not flying:
            return ordered.explorer
        proposal = flying.pop(chance.randrange(min(processes, len(flying))))
        if fail is not None and proposal.number == fail:
            ordered.finish(proposal.number, FailedTrial(coefficients=proposal.coefficients, error="OSError: no disk"))
            continue
        rungs = world(proposal.coefficients)
        seen = rungs[:1] if not ordered.promising(proposal.number, rungs[:1]) else rungs
        answers = sum(RUNGS[: len(seen)])
        ordered.finish(proposal.number, Tried(rungs=seen, complete=len(seen) == 2, answers=answers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"trials": 16, "sampler": "gp"},
        {"trials": 60, "sampler": "tpe", "patience": 6},
        {"trials": 24, "sampler": "nsga2"},
        {"trials": 99, "sampler": "random", "answers": 12 * 64},
    ],
    ids=lambda options: options["sampler"],
)
def test_the_same_search_on_any_number_of_processes(options, world):  # noqa: F811
    results = [carry_out(world, options, processes=n, seed=n).result() for n in (1, 2, 4)]
    assert results[0].stopped
    assert results[0] == results[1] == results[2]


def test_a_failed_setting_is_taken_in_at_its_place(world):  # noqa: F811
    options = {"trials": 14, "sampler": "tpe"}
    results = [carry_out(world, options, processes=n, seed=n, fail=7).result() for n in (1, 3)]
    assert results[0] == results[1]
    assert [failed.error for failed in results[0].failed] == ["OSError: no disk"]


def test_results_that_came_after_the_end_do_not_count_when_it_is_opened_again(world):  # noqa: F811
    options = {"trials": 60, "sampler": "tpe", "patience": 6}
    explorer = carry_out(world, options, processes=4, seed=3)
    assert "stopped moving" in explorer.ended
    # The journal also has what was measured ahead of the results that ended the search.
    ahead = Tried(rungs=world({"a": 0.5, "b": 0.5}), complete=True, answers=64)
    again = replace(opened(explorer), known=[*explorer.tried, ahead])
    assert again.result() == explorer.result()


def test_a_search_is_not_over_while_its_base_may_fail():
    """The last proposal is made, but the base is under way: it is tried once more where it fails."""
    ordered = Ordered(explore(trials=2, sampler="random"), 2)
    base, other = ordered.propose(), ordered.propose()
    assert base is not None
    assert other is not None
    assert ordered.explorer.ended
    assert not ordered.over
    ordered.finish(base.number, FailedTrial(coefficients=base.coefficients, error="OSError: no disk"))
    again = ordered.propose()
    assert again is not None
    assert again.coefficients == base.coefficients

"""What the driver does with the reports of trials, without Ray."""

import time
from typing import Any

import pytest

from prefvec_ray.evaluation import Evaluation
from prefvec_ray.search import Progress, Tried
from prefvec_ray.search.driver import _Monitor
from prefvec_ray.search.explore import Proposal
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.ordered import Ordered
from tests.search.test_explore import RUNGS, explore, world  # noqa: F401


class NoWait:
    def poll(self, started: bool) -> None:
        pass


@pytest.fixture
def search(tmp_path):
    """A monitor with two settings under way, its journal, and what it reported."""
    with Journal(tmp_path, {}) as journal:
        ordered = Ordered(explore(trials=6, sampler="random"), 2)
        seen: list[Progress] = []
        monitor = _Monitor(ordered, journal, seen.append, time.perf_counter(), NoWait())  # type: ignore[arg-type]
        yield monitor, [ordered.propose(), ordered.propose()], seen


def report(proposal: Proposal, rungs: list[Evaluation]) -> dict[str, Any]:
    """As `Trial.step` gives it."""
    complete = len(rungs) == len(RUNGS)
    tried = Tried(rungs=rungs, complete=complete, answers=sum(RUNGS[: len(rungs)]))
    config = {"number": proposal.number, "coefficients": proposal.coefficients}
    return {"tried": tried.model_dump_json(), "done": complete, "config": config}


def test_a_trial_goes_on_until_it_is_measured_and_is_then_in_the_journal(search, world, tmp_path):  # noqa: F811
    monitor, (base, _), seen = search
    rungs = world(base.coefficients)
    assert not monitor("a", report(base, rungs[:1])), "the base is measured to the end"
    assert monitor("a", report(base, rungs))
    assert [(now.done, now.dropped, now.failed) for now in seen] == [(1, 0, 0)]
    (line,) = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert Tried.model_validate_json(line).rungs == rungs


def test_a_setting_that_has_lost_is_stopped_at_its_rung(search, world):  # noqa: F811
    monitor, (base, _), seen = search
    monitor("a", report(base, world(base.coefficients)))
    proposal = monitor.ordered.propose()
    beaten = [
        evaluation.model_copy(update={"coefficients": proposal.coefficients})
        for evaluation in world({"a": -1.0, "b": -1.0})
    ]
    monitor.explorer.tried.append(Tried(rungs=world({"a": 0.9, "b": 0.6}), complete=True, answers=64))
    monitor.ordered._known_then[proposal.number] = len(monitor.explorer.tried)
    assert monitor("b", report(proposal, beaten[:1]))
    assert monitor.ordered._results[proposal.number].complete is False
    assert seen[-1].done == 3


def test_an_error_fails_its_setting_alone(search):
    monitor, (_, other), seen = search
    config = {"number": other.number, "coefficients": other.coefficients}
    assert monitor("b", {"error": "RuntimeError: the judge sleeps", "done": True, "config": config})
    assert str(seen[-1].failure) == f"failed at {other.coefficients}: RuntimeError: the judge sleeps"
    assert not monitor.stop_all()


def test_a_process_that_cannot_be_set_up_ends_the_search(search):
    monitor, _, seen = search
    assert monitor("a", {"error": "node x does not see base", "unfit": True, "done": True, "config": {}})
    assert monitor.unfit == "node x does not see base"
    assert monitor.stop_all()
    assert not seen

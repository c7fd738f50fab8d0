"""The coordinator of several fronts, alone; tests of fronts that share one are in test_rollout.py."""

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from prefvec_ray.serving import ServingConfig
from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.config import Allowance
from prefvec_ray.serving.http import coordinator as module
from prefvec_ray.serving.http.coordinator import Coordinator
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.serving.release.rollout import ReleaseBook


def test_a_refusal_passes_between_processes_whole():
    refusal = ApiError(429, "wait", code="rate", param="n", kind="requests", headers={"retry-after": "3"})
    found = pickle.loads(pickle.dumps(refusal))
    assert (found.status, found.body(), found.headers) == (refusal.status, refusal.body(), refusal.headers)
    assert str(found) == "wait"


@pytest.fixture
def make(base_folder: Path, registry_root: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Coordinator]:
    """A coordinator that is not deployed, with a replica that is never asked."""
    config = ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": registry_root, "limits": {"seconds": 0.2}}
    )
    monkeypatch.setattr(ReleaseBook, "newest", lambda book: None)
    monkeypatch.setattr(module, "GONE_SECONDS", 0.0)
    return lambda: Coordinator(config, resolve_release(config), None)


def test_the_requests_of_a_front_that_died_end_after_their_deadline(make):
    allowance = Allowance(requests_at_once=1, tokens_per_minute=100)

    async def scene() -> None:
        coordinator = make()
        assert await coordinator.begin("lost", "a", allowance) is None
        assert await coordinator.reserve("lost", 60) == {
            "x-ratelimit-limit-tokens": "100",
            "x-ratelimit-remaining-tokens": "40",
            "x-ratelimit-reset-tokens": "60s",
        }
        refused = await coordinator.begin("second", "a", allowance)
        assert isinstance(refused, ApiError)
        assert refused.error.code == "too_many_at_once"
        await asyncio.sleep(0.3)
        assert await coordinator.begin("third", "a", allowance) is None
        too_many = await coordinator.reserve("third", 60)
        assert isinstance(too_many, ApiError), "what the lost one may have used stays counted"
        assert too_many.status == 429
        await coordinator.end("lost", 0)  # it comes after all, too late

    asyncio.run(scene())


def test_what_a_coordinator_does_not_know_is_refused_and_never_guessed(make):
    async def scene() -> None:
        coordinator = make()
        said = await coordinator.reserve("of another life", 5)
        assert isinstance(said, ApiError)
        assert said.status == 503
        await coordinator.end("of another life", 5)
        await coordinator.refuse("of another life", 5)

    asyncio.run(scene())

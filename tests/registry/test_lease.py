"""One writer per store, whatever the clocks say."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import LeaseLost, Registry
from prefvec_ray.registry.lease import CLAIM, Lease
from prefvec_ray.registry.store import Store

Make = Callable[..., Path]
Open = Callable[..., Registry]


def lease(root: str, owner: str, ttl_s: float = 0.6, settle_s: float = 0.1) -> Lease:
    return Lease(Store.open(root), owner, ttl_s=ttl_s, settle_s=settle_s)


def test_one_at_a_time(root: str) -> None:
    first, second = lease(root, "first"), lease(root, "second")
    first.acquire()
    with pytest.raises(InputError, match=r"is being written to by first \(pid \d+ on .*; publish through it"):
        second.acquire(wait_s=0.1)
    with pytest.raises(LeaseLost, match="does not hold"):
        second.check()
    first.check()
    first.release()
    second.acquire(wait_s=0.1)
    assert second.epoch == 2
    with pytest.raises(LeaseLost):
        first.check()
    second.release()


@pytest.mark.slow
def test_many_candidates_take_turns(root: str) -> None:
    """Never two inside at once; every epoch is used once.

    A request that a busy machine delays for longer than settle_s takes the lease from its holder: `check` says so, and
    the holder tries again.
    """
    from concurrent.futures import ThreadPoolExecutor

    inside, most, epochs = 0, 0, []

    def enter(number: int) -> None:
        nonlocal inside, most
        candidate = lease(root, f"candidate {number}", ttl_s=5, settle_s=0.3)
        turns = 0
        while turns < 3:
            candidate.acquire(wait_s=90)
            try:
                candidate.check()
            except LeaseLost:
                continue
            inside += 1
            most = max(most, inside)
            epochs.append(candidate.epoch)
            time.sleep(0.01)
            inside -= 1
            candidate.release()
            turns += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(1, 5)))
    assert most == 1
    assert len(set(epochs)) == len(epochs) == 12


def test_a_silent_holder_of_a_bucket_is_replaced_and_cannot_write(bucket_root: str, make_vector: Make) -> None:
    store = Store.open(bucket_root)
    silent = Lease(store, "silent", ttl_s=0.6, settle_s=0.1)
    silent.acquire()
    silent._stop.set()  # as if its process were suspended: no heartbeat from here on
    began = time.monotonic()
    successor = lease(bucket_root, "successor")
    successor.acquire(wait_s=10)
    assert time.monotonic() - began > 0.5
    with pytest.raises(LeaseLost, match="passed to successor"):
        store.create("vectors/late/1.json", b"late", silent.check)
    assert store.read("vectors/late/1.json") is None
    successor.check()
    successor.release()


def test_a_living_holder_of_a_bucket_is_not_replaced(bucket_root: str) -> None:
    # Long enough that a busy machine does not take a heartbeat's time away.
    holder, other = (lease(bucket_root, owner, ttl_s=2.0, settle_s=0.4) for owner in ("holder", "other"))
    holder.acquire()
    with pytest.raises(InputError, match="by holder"):
        other.acquire(wait_s=4.5)  # more than two lifetimes without a heartbeat
    holder.check()
    holder.release()


def test_the_next_life_of_an_owner_need_not_wait(bucket_root: str) -> None:
    lease(bucket_root, "actor 7", ttl_s=60).acquire()  # and dies without a word
    began = time.monotonic()
    again = lease(bucket_root, "actor 7", ttl_s=60)
    again.acquire(wait_s=20)
    assert time.monotonic() - began < 30, "less than the earlier life's 60 s"
    assert again.epoch == 2
    again.release()


def test_a_damaged_claim_is_replaced(root: str) -> None:
    first = lease(root, "first")
    first.acquire()
    first.store.overwrite(CLAIM, b"{")
    with pytest.raises(LeaseLost):
        first.check()
    second = lease(root, "second")
    second.acquire(wait_s=10)  # in a bucket: after a lifetime of silence
    second.check()
    second.release()


def test_clocks_may_jump(root: str, open_registry: Open, make_vector: Make) -> None:
    """Writers whose clocks are decades apart: nothing is decided by them, they only show as dates."""
    dates = [2.0e9, 1.0e9, 0.0, 4.0e9]
    published = []
    for seed, date in enumerate(dates):
        registry = open_registry(root, clock=lambda date=date: date)
        published.append(registry.publish_vector(make_vector(seed=seed)))
        registry.set_alias("helpful", "production", seed + 1, "newer")
    assert [version.version for version in published] == [1, 2, 3, 4]
    assert [version.created for version in published] == dates
    reader = open_registry(root, clock=lambda: -5.0)
    assert reader.resolve("helpful") == reader.resolve("helpful@production") == published[-1]
    assert [move.version for move in reader.alias_history("helpful", "production")] == [1, 2, 3, 4]
    orphan, _ = reader.store.stage(make_vector(seed=9) / "vector.safetensors")
    future = open_registry(root, clock=lambda: 9.0e9)
    assert future.gc(apply=True).blobs.keys() == {orphan}  # takes even a fresh orphan for an old one ...
    assert future.verify().sound  # ... but never what is published


@pytest.mark.slow
def test_an_actor_whose_cluster_has_ended_is_waited_for(tmp_path: Path) -> None:
    """Its driver was killed, and with it the raylet; the actor's process ends a few seconds later."""
    code = (
        "import sys, time; from prefvec_ray.registry.lease import Lease; from prefvec_ray.registry.store import Store\n"
        "Lease(Store.open(sys.argv[1]), 'actor a (1)', lasting=True).acquire(wait_s=60); print('held', flush=True)\n"
        "time.sleep(3)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == "held\n"
        lease(str(tmp_path / "store"), "actor a (2)").acquire(wait_s=60)
        assert orphan.wait(timeout=60) == 0

"""Conditional writes: the bucket itself refuses to put one record over another, whatever the lease says."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefvec_ray.registry import LeaseLost, Registry
from prefvec_ray.registry import conditional as conditional_writes
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.store import MARKER, Store

Make = Callable[..., Path]
Open = Callable[..., Registry]


@pytest.fixture
def store(bucket_root: str) -> Store:
    store = Store.open(bucket_root)
    store.begin()
    return store


def allowed() -> None:
    """A lease that is always held."""


def test_a_record_is_never_written_over_another(bucket_root: str, store: Store) -> None:
    """Two writers that both looked before either wrote, and both believe that they hold the lease."""
    late = Store.open(bucket_root)
    assert late.conditional_writes()[0] is not None
    store.create("vectors/helpful/1.json", b"first", allowed)
    assert late._put("vectors/helpful/1.json", b"second") == b"first"  # past the look that `create` begins with
    assert store.read_fresh("vectors/helpful/1.json") == b"first"
    with pytest.raises(FileExistsError):
        Store.open(bucket_root).create("vectors/helpful/1.json", b"second", allowed)
    Store.open(bucket_root).create("vectors/helpful/1.json", b"first", allowed)  # the same again is no conflict


def test_the_answer_of_a_lost_request_is_found_again(store: Store) -> None:
    """The first attempt arrived and its answer was lost: the second finds its own bytes."""
    writer, _ = store.conditional_writes()
    assert writer is not None
    path = store.root.path_in_bucket("vectors/helpful/1.json")
    assert writer.create(path, b"mine")
    assert not writer.create(path, b"mine")
    store.create("vectors/helpful/1.json", b"mine", allowed)


def test_a_writer_whose_lease_has_passed_cannot_replace_a_record(
    bucket_root: str, open_registry: Open, make_vector: Make
) -> None:
    """It was suspended between its look and its request; its successor has published meanwhile."""
    successor = open_registry(bucket_root)
    suspended = open_registry(bucket_root, "other-cache")
    successor.publish_vector(make_vector(seed=1))
    put, between = suspended.store._put, []

    def late(key: str, data: bytes) -> bytes | None:
        if key.startswith("vectors/"):
            suspended.lease._stop.set()  # no heartbeat any more
            suspended.store.overwrite("lease/claim.json", b"{}")  # its lease has ended
            taker = Lease(successor.store, "successor", ttl_s=0.5, settle_s=0.1)
            taker.acquire(wait_s=30)
            record = successor.store.read_fresh("vectors/helpful/1.json")
            assert record
            successor.store.create(key, record.replace(b'"version":1', b'"version":2'), taker.check)
            between.append(successor.store.read_fresh(key))
            taker.release()
        return put(key, data)

    suspended.store._put = late  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        suspended.publish_vector(make_vector(seed=2))
    assert between == [successor.store.read_fresh("vectors/helpful/2.json")]


def test_a_number_that_was_taken_meanwhile_is_skipped(bucket_root: str, open_registry: Open, make_vector: Make) -> None:
    """The actor's memory does not know of a record that arrived late from a writer before it."""
    registry = open_registry(bucket_root)
    registry.publish_vector(make_vector(seed=1))
    with registry.lease.held():
        registry.store.load_mirror()
        late = registry.store.read_fresh("vectors/helpful/1.json")
        assert late
        Store.open(bucket_root).create("vectors/helpful/2.json", late, allowed)
        assert registry.publish_vector(make_vector(seed=2)).version == 3
    assert registry.versions("helpful") == [1, 2, 3]


def test_a_bucket_that_ignores_the_condition_is_noticed(
    bucket_root: str,
    make_vector: Make,
    open_registry: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some servers that speak S3 overwrite in silence. Then the lease alone protects, and log and doctor say so."""
    from moto.s3 import responses

    original = responses.S3Response.put_object

    def deaf(self: responses.S3Response) -> object:
        self.headers = {k: v for k, v in self.headers.items() if k.lower() != "if-none-match"}
        return original(self)

    monkeypatch.setattr(responses.S3Response, "put_object", deaf)
    with caplog.at_level(logging.WARNING):
        registry = open_registry(bucket_root)
        registry.publish_vector(make_vector())
    assert registry.store.conditional_writes() == (None, "the bucket ignores the condition")
    assert "the bucket ignores the condition" in caplog.text
    assert registry.verify().sound
    (check,) = [check for check in registry.doctor() if check.what == "conditional writes"]
    assert "the lease alone protects" in check.detail


def test_a_client_that_cannot_be_had_leaves_the_lease(
    bucket_root: str,
    make_vector: Make,
    open_registry: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Credentials that only pyarrow finds, say. No secret is in the log."""
    monkeypatch.setattr(conditional_writes, "RETRY", {"max_retries": 0})
    real = conditional_writes._bucket
    monkeypatch.setattr(conditional_writes, "_bucket", lambda uri: real(uri.replace("vectors/", "no-such-bucket/", 1)))
    registry = open_registry(bucket_root)
    assert registry.publish_vector(make_vector()).version == 1
    assert registry.store.conditional_writes()[0] is None
    assert "the lease alone protects" in caplog.text
    assert "hush-hush" not in caplog.text


def test_where_the_requests_go(bucket_root: str) -> None:
    """The addresses of pyarrow's URIs, understood as pyarrow does."""
    bucket = conditional_writes._bucket("s3://key:s%2Fecret@name/prefix?region=eu-west-1&endpoint_override=host:9000")
    config = {str(key): value for key, value in bucket.config.items()}
    assert config["bucket"] == "name"
    assert config["region"] == "eu-west-1"
    assert config["secret_access_key"] == "s/ecret"
    assert config["endpoint"] == "https://host:9000"
    assert conditional_writes._bucket("abfs://container@account/path") is None


def test_a_folder_needs_none(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    store.begin()
    assert store.conditional_writes() == (None, "a folder links its records")
    assert store.read(MARKER)

"""The registry through its actor, on the suite's cluster."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, RegistryClient, open_registry, start_registry, stop_registry
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.running import running_registries
from prefvec_ray.vectors import load_vector

Make = Callable[..., Path]


@pytest.fixture
def client(ray_cluster: str, root: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RegistryClient]:
    name = f"registry-{tmp_path.name}"
    started = start_registry(root, name=name, cache=NodeCache(tmp_path / "cache"), ttl_s=5.0, settle_s=0.2)
    yield started
    started.stop()


def test_the_same_methods_through_the_actor(
    client: RegistryClient, root: str, open_registry: Callable[..., Registry], make_vector: Make
) -> None:
    published = client.publish_vector(make_vector("helpful", 1), metrics={"gain": 0.1})
    client.publish_vector(make_vector("helpful", 2))
    client.set_alias("helpful", "production", 1, "good")
    preset = client.publish_preset("cautious", {"helpful@1": 0.5}, reason="knee")
    assert client.resolve("helpful@production") == published
    assert client.resolve_preset("cautious") == preset
    assert [version.ref for version in client.list_vectors()] == ["helpful@1", "helpful@2"]
    assert load_vector(client.fetch("helpful@production")).digest() == published.digest
    assert client.lineage(preset.fingerprint).ids("vector") == [published.digest]
    assert client.verify().findings == ()
    assert client.gc().blobs == {}
    assert client.health()["vectors"] == 2
    assert "problem" not in {check.level for check in client.doctor()}
    with pytest.raises(InputError, match="no vector 'nope'"):
        client.resolve("nope")
    with pytest.raises(InputError, match="pinned version"):
        client.publish_preset("bad", {"helpful": 1.0}, reason="r")

    reader = open_registry(root, "other-cache")  # reads need no actor, writes are its own
    assert reader.resolve("helpful@production") == published
    with pytest.raises(InputError, match="is being written to by actor registry-"):
        reader.set_alias("helpful", "production", 2, "better")


def test_two_actors_cannot_write_to_one_store(client: RegistryClient, root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is being written to by actor registry-.*use --registry ray:registry-"):
        start_registry(root, name="second", ttl_s=5.0, settle_s=0.2)
    with pytest.raises(InputError, match="no registry actor 'second'"):
        RegistryClient.connect("second")
    with pytest.raises(InputError, match=r"serves .*store, not .*elsewhere; use that root or another name"):
        start_registry(tmp_path / "elsewhere", name=f"registry-{tmp_path.name}")
    assert client.health()["vectors"] == 0


def test_registries_of_two_users_live_on_one_cluster(ray_cluster: str, tmp_path: Path, make_vector: Make) -> None:
    """Each actor is named after its store; ending one leaves the other as it was."""
    ours, theirs = (start_registry(tmp_path / user) for user in ("ours", "theirs"))
    assert ours.name != theirs.name
    assert start_registry(tmp_path / "ours").name == ours.name, "the same store has the same actor"
    ours.publish_vector(make_vector("helpful", 1))
    theirs.publish_vector(make_vector("harmless", 2))
    running = running_registries()
    assert running[ours.name] == str(tmp_path / "ours")
    before = theirs.health()

    assert open_registry(f"ray:{ours.name}").list_vectors() == ours.list_vectors()
    with pytest.raises(InputError, match=rf"no registry actor 'prefvec-registry': .*ray:{ours.name} \({tmp_path}/ours"):
        open_registry("ray:prefvec-registry")

    assert stop_registry(tmp_path / "ours") == ours.name
    with pytest.raises(InputError, match=rf"no actor to stop; running are .*ray:{theirs.name}"):
        stop_registry(f"ray:{ours.name}")
    with pytest.raises(InputError, match="no actor to stop"):
        stop_registry(tmp_path / "ours")
    assert theirs.health() == before
    assert [version.ref for version in theirs.list_vectors()] == ["harmless@1"]

    alone = Registry.open(tmp_path / "ours", cache=NodeCache(tmp_path / "cache"))
    alone.set_alias("helpful", "production", 1, "nobody else writes now")
    assert start_registry(tmp_path / "ours").resolve("helpful@production").version == 1
    stop_registry(f"ray:{ours.name}")
    stop_registry(f"ray:{theirs.name}")


def test_a_copy_of_a_registry_has_an_actor_of_its_own(ray_cluster: str, tmp_path: Path, make_vector: Make) -> None:
    """The copy holds the same identity; what is published into it must not go into the original."""
    first = start_registry(tmp_path / "original")
    first.publish_vector(make_vector("helpful", 1))
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = start_registry(tmp_path / "copy")
    copy.publish_vector(make_vector("helpful", 2))
    assert [len(client.list_vectors()) for client in (first, copy)] == [1, 2]
    stop_registry(tmp_path / "original")
    stop_registry(tmp_path / "copy")


def test_joining_a_registry_that_another_writes_to_leaves_its_actor_alone(
    client: RegistryClient, root: str, tmp_path: Path
) -> None:
    """A process that only wanted to join must not end an actor that others use."""
    pid = client.health()["lease"]["pid"]
    with pytest.raises(InputError, match="use that root or another name"):
        start_registry(tmp_path / "elsewhere", name=client.name)
    assert client.health()["lease"]["pid"] == pid


def test_tasks_use_a_client_that_they_are_given(client: RegistryClient, make_vector: Make) -> None:
    published = client.publish_vector(make_vector())

    @ray.remote(num_cpus=0)
    def digest(registry: RegistryClient, cache: Path) -> str:
        registry.cache = NodeCache(cache)
        return load_vector(registry.fetch("helpful")).digest()

    assert ray.get(digest.remote(client, client.cache.folder)) == published.digest


def test_a_killed_actor_comes_back_with_everything(client: RegistryClient, make_vector: Make) -> None:
    folder = make_vector()
    published = client.publish_vector(folder)
    client.hold("replica-1", ["helpful@1"])
    epoch = client.health()["lease"]["epoch"]
    os.kill(client.health()["lease"]["pid"], signal.SIGKILL)
    assert client.resolve("helpful") == published
    assert client.publish_vector(folder) == published
    assert client.health()["lease"]["epoch"] > epoch
    with pytest.raises(InputError, match="replica replica-1"):
        client.retire("helpful@1", "old")


def test_bytes_through_the_object_store(client: RegistryClient, root: str, tmp_path: Path, make_vector: Make) -> None:
    """A client that never touches the storage publishes and fetches; equal bytes, checked on both ends."""
    name = f"registry-{tmp_path.name}"
    remote = RegistryClient.connect(name, transport="ray", cache=NodeCache(tmp_path / "remote-cache"))
    assert not remote.reachable
    folder = make_vector(size=64, max_shard_size=1024)
    published = remote.publish_vector(folder)
    assert client.verify().findings == remote.verify().findings == ()
    fetched = remote.fetch("helpful")
    for file in published.files:
        assert (fetched / file.name).read_bytes() == (folder / file.name).read_bytes()
    assert (remote.cache.hits, remote.cache.misses) == (0, 1)
    remote.fetch("helpful")
    assert (remote.cache.hits, remote.cache.misses) == (1, 1)
    bundle = remote.export_bundle(tmp_path / "out.prefvec", ["helpful@1"])
    assert client.import_bundle(bundle) == {"helpful@1": "helpful@1"}

"""verify, gc, doctor: what is damaged is found, what is needed is never deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import FileEntry, Registry, StoreError, verify
from prefvec_ray.registry.blobs import blob_key, hash_file
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.records import digest_of, encode
from prefvec_ray.registry.store import Store
from prefvec_ray.vectors import PreferenceVector, load_vector

Make = Callable[..., Path]
BASE = "blake3:" + "b" * 64


@pytest.fixture
def full(registry: Registry, make_vector: Make) -> Registry:
    """A registry with one of every kind of file."""
    with registry.lease.held():
        registry.publish_vector(make_vector("helpful", 1))
        registry.publish_vector(make_vector("helpful", 2))
        registry.publish_vector(make_vector("harmless", 3))
        registry.set_alias("helpful", "production", 1, "good")
        registry.set_alias("helpful", "production", 2, "better")
        registry.set_tags("helpful@1", {"stage": "shipped"}, "it is")
        registry.publish_preset("cautious", {"helpful@2": 0.5}, reason="knee")
        registry.record_served({"helpful@2": 0.1}, base_fingerprint=BASE)
        registry.hold("replica-1", ["helpful@2"])
        registry.retire("harmless@1", "it was not")
    return registry


def keys(store: Store) -> list[str]:
    """Every file of the store, except the lock, which is empty."""
    found = [*store.record_keys(), "registry.json", "lease/claim.json", "holds/replica-1.json"]
    return found + [blob_key(digest) for digest in store.blobs()]


def contents(store: Store) -> dict[str, bytes | None]:
    return {key: store.read_fresh(key) for key in keys(store)}


def test_a_sound_store_is_sound(full: Registry) -> None:
    before = contents(full.store)
    report = full.verify()
    assert report.sound
    assert [finding.kind for finding in report.findings] == ["orphan blob"]  # of the retired version
    assert (report.blobs, report.records) == (3, 10)
    assert contents(full.store) == before
    assert {check.level for check in full.doctor()} <= {"ok", "warning"}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damage_to_any_file_is_found(full: Registry, damage: str) -> None:
    """One flipped bit, a missing tail or nothing left: in each stored file, `verify` names exactly that file."""
    everything = keys(full.store)
    for top in ("vectors", "presets", "refs", "tags", "retired", "served", "blobs", "lease", "holds", "registry"):
        assert any(key.startswith(top) for key in everything)
    for index, key in enumerate(everything):
        good = full.store.read_fresh(key)
        assert good
        at = (index * 7919) % len(good)
        bad = {"flip": good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :], "cut": good[: len(good) - 1], "empty": b""}
        full.store.overwrite(key, bad[damage])
        report = full.verify()
        assert not report.sound, key
        assert any(finding.path == key and finding.harm for finding in report.findings), (key, report.findings)
        assert full.store.read_fresh(key) == bad[damage]
        full.store.overwrite(key, good)
    assert full.verify().sound


def test_sound_blobs_are_read_once_and_versions_of_the_same_files_together(full: Registry, make_vector: Make) -> None:
    """Files of several shards, one file of two versions, a README: only what holds no numbers is hashed apart."""
    full.publish_vector(make_vector("sharded", 7, max_shard_size=512))
    full.publish_vector(make_vector("helpful", 1), notes="the same files, another version")
    folder = make_vector("described", 8)
    (folder / "README.md").write_text("not a vector's number")
    full.publish_vector(folder)
    hashed: list[str] = []
    read: list[PreferenceVector] = []
    digest = PreferenceVector.validated_digest

    def hash_seen(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    def read_seen(self: PreferenceVector, seen: Any) -> str:
        read.append(self)
        return digest(self, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "hash_file", hash_seen)
        patch.setattr(PreferenceVector, "validated_digest", read_seen)
        assert full.verify().sound
    beside = sorted(name for name in hashed if len(name) < 64)  # an orphan, named by its digest, is hashed too
    assert beside == ["README.md", "vector.safetensors.index.json"]
    assert len(read) == 4


def test_numbers_that_are_not_finite_are_found(full: Registry, make_vector: Make, tmp_path: Path) -> None:
    """A vector that was written to the store past every check."""
    stated = full.resolve("helpful@1")
    file = make_vector("helpful", 9) / "vector.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"
    file.write_bytes(data)
    digest, size = full.store.stage(file)
    entry = FileEntry(name=file.name, digest=digest, size=size)
    vector = load_vector(file.parent)
    bad = stated.model_copy(update={"version": 3, "files": (entry,), "digest": vector.digest()})
    full.store.overwrite("vectors/helpful/3.json", encode(bad))
    (finding,) = [finding for finding in full.verify().findings if finding.harm]
    assert (finding.kind, finding.path) == ("wrong statement", "vectors/helpful/3.json")
    assert "holds NaN or infinity" in finding.detail


def test_missing_files_are_found(full: Registry) -> None:
    blob = blob_key(full.resolve("helpful@1").files[0].digest)
    for key, kind, path in [
        (blob, "missing blob", blob),
        ("refs/vectors/helpful/production/1.json", "missing record", "refs/vectors/helpful/production/1.json"),
        ("vectors/helpful/2.json", "dangling reference", "presets/cautious/1.json"),
        ("registry.json", "corrupt record", "registry.json"),
    ]:
        good = full.store.read_fresh(key)
        assert good
        full.store.delete(key)
        assert (kind, path) in {(finding.kind, finding.path) for finding in full.verify().findings}
        full.store.overwrite(key, good)
    assert full.verify().sound


def test_swapped_and_forged_records_are_found(full: Registry) -> None:
    one, two = (full.store.read_fresh(f"vectors/helpful/{n}.json") for n in (1, 2))
    assert one
    assert two
    full.store.overwrite("vectors/helpful/1.json", two)
    assert not full.verify().sound
    with pytest.raises(StoreError, match="holds helpful@2"):
        full.resolve("helpful@1")
    full.store.overwrite("vectors/helpful/1.json", one.replace(b'"gain"', b'"pain"').replace(b"0.0", b"9.9"))
    with pytest.raises(StoreError, match="is damaged"):
        full.resolve("helpful@1")
    full.store.overwrite("vectors/helpful/1.json", one)


def test_a_newer_format_is_refused_and_kept(full: Registry, make_vector: Make) -> None:
    newer = b'{"format":2,"kind":"vector","name":"helpful","something":"new","version":3}'
    digest = digest_of({"format": 2, "kind": "vector", "name": "helpful", "something": "new", "version": 3})[7:]
    line = b'{"blake3":"%s","record":%s}\n' % (digest.encode(), newer)
    full.store.overwrite("vectors/helpful/3.json", line)
    with pytest.raises(InputError, match="record format 2, this release reads 1; upgrade prefvec-ray"):
        full.resolve("helpful")
    assert [f.kind for f in full.verify().findings if f.path == "vectors/helpful/3.json"] == ["newer record"]
    with pytest.raises(StoreError, match="what it needs is not known"):
        full.gc(apply=True, grace_s=0)
    assert full.publish_vector(make_vector("helpful", 9)).version == 4
    assert full.store.read_fresh("vectors/helpful/3.json") == line


def test_publishing_again_mends_a_blob(root: str, open_registry: Callable[..., Registry], make_vector: Make) -> None:
    registry, folder = open_registry(root), make_vector()
    published = registry.publish_vector(folder)
    key = blob_key(published.files[0].digest)
    good = registry.store.read_fresh(key)
    assert good
    registry.store.overwrite(key, good[:-100])
    with pytest.raises(StoreError, match="does not have the bytes that were published"):
        registry.fetch("helpful")
    assert registry.publish_vector(folder) == published
    assert registry.verify().sound
    assert load_vector(registry.fetch("helpful")).digest() == published.digest


def test_gc_deletes_only_what_nothing_needs(full: Registry, make_vector: Make) -> None:
    orphan, _ = full.store.stage(make_vector("abandoned", 7) / "vector.safetensors")
    retired = full.store.blobs().keys() - {f.digest for v in full.list_vectors() for f in v.files} - {orphan}
    dry = full.gc(grace_s=0)
    assert not dry.applied
    assert dry.blobs.keys() == {orphan, *retired}
    assert full.store.blob_size(orphan)
    assert full.gc(apply=True).blobs == {}  # all are younger than an hour
    assert orphan in full.gc(apply=True).spared
    done = full.gc(apply=True, grace_s=0)
    assert done.applied
    assert done.bytes == dry.bytes > 0
    assert full.verify().findings == ()
    for version in full.list_vectors():
        assert load_vector(full.fetch(version.ref)).digest() == version.digest


def test_what_is_used_cannot_be_retired(full: Registry, make_vector: Make) -> None:
    for ref, users in [("helpful@2", "alias helpful@production, preset cautious@1, replica replica-1")]:
        with pytest.raises(InputError, match=users):
            full.retire(ref, "old")
    full.publish_vector(make_vector("helpful", 5))
    full.set_alias("helpful", "production", 3, "newest")
    full.release("replica-1")
    with pytest.raises(InputError, match="used by preset cautious@1"):
        full.retire("helpful@2", "old")  # presets are for ever
    retirement = full.retire("helpful@1", "replaced by helpful@3")
    assert full.retire("helpful@1", "replaced by helpful@3") == retirement
    with pytest.raises(InputError, match=r"helpful@1 was retired \(replaced by helpful@3\)"):
        full.resolve("helpful@1")
    assert full.versions("helpful") == [2, 3]
    full.gc(apply=True, grace_s=0)
    again = full.publish_vector(make_vector("helpful", 1))
    assert again.version == 4  # numbers are never used again
    assert full.verify().sound


def test_a_damaged_hold_holds_everything(full: Registry, make_vector: Make) -> None:
    full.store.overwrite("holds/replica-1.json", b"{")
    full.publish_vector(make_vector("spare", 6))
    with pytest.raises(InputError, match="replica replica-1"):
        full.retire("spare@1", "not needed")


def test_doctor_says_what_is_wrong(tmp_path: Path, open_registry: Callable[..., Registry], make_vector: Make) -> None:
    registry = open_registry(tmp_path / "store")
    published = registry.publish_vector(make_vector())
    fetched = registry.fetch("helpful")
    assert all(check.level == "ok" for check in registry.doctor() if check.what != "store space")
    shutil.copy(fetched / "vector.safetensors", tmp_path / "copy")
    (fetched / "vector.safetensors").unlink()
    (fetched / "vector.safetensors").write_bytes((tmp_path / "copy").read_bytes()[:-1] + b"?")
    (tmp_path / "store" / blob_key(published.files[0].digest)).unlink()
    levels = {check.what: check.level for check in registry.doctor()}
    assert levels["missing blob"] == "problem"
    assert levels["cached files"] == "warning"
    missing = open_registry(tmp_path / "nowhere").doctor()
    assert missing[0].level == "problem"


def test_a_cut_cache_file_is_fetched_again(tmp_path: Path, root: str, make_vector: Make) -> None:
    registry = Registry.open(root, cache=NodeCache(tmp_path / "cache"), settle_s=0.2)
    published = registry.publish_vector(make_vector())
    for damage in (lambda b: b[:-5], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:]):
        file = registry.fetch("helpful") / "vector.safetensors"
        good = file.read_bytes()
        file.unlink()  # never through the link: it may be the store's own file
        file.write_bytes(damage(good))
        again = registry.fetch("helpful") / "vector.safetensors"
        assert again.read_bytes() == good
        assert load_vector(again.parent).digest() == published.digest
    assert registry.verify().sound

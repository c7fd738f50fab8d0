"""The registry from a user's side, on a folder and on a bucket."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, serving_fingerprint
from prefvec_ray.registry.catalog import OPERATIONS, Catalog
from prefvec_ray.vectors import load_vector

Make = Callable[..., Path]
BASE = "blake3:" + "b" * 64


def test_publish_resolve_fetch(registry: Registry, make_vector: Make) -> None:
    folder = make_vector("helpful", data_digest="blake3:data", recipe={"beta": 0.1})
    published = registry.publish_vector(folder, metrics={"gain": 0.2}, license="apache-2.0", notes="first try")
    assert published.ref == "helpful@1"
    assert published.digest == load_vector(folder).digest()
    assert (published.form, published.dtype, published.base_fingerprint) == ("full", "float32", BASE)
    assert published.data_digest == "blake3:data"
    assert published.recipe["beta"] == 0.1
    assert published.libraries["torch"]
    assert published.creator
    assert registry.resolve("helpful") == registry.resolve("helpful@1") == published

    fetched = registry.fetch("helpful")
    assert load_vector(fetched).digest() == published.digest
    assert (fetched / "vector.safetensors").read_bytes() == (folder / "vector.safetensors").read_bytes()


def test_sharded_vectors_keep_their_files(registry: Registry, make_vector: Make) -> None:
    folder = make_vector(max_shard_size=512)
    published = registry.publish_vector(folder)
    assert len(published.files) == 3
    assert load_vector(registry.fetch("helpful")).digest() == load_vector(folder).digest() == published.digest


def test_a_version_never_changes(registry: Registry, make_vector: Make) -> None:
    first, second = make_vector(seed=1), make_vector(seed=2)
    one = registry.publish_vector(first)
    assert registry.publish_vector(first) == one  # the same again is the same version
    two = registry.publish_vector(second)
    assert two.version == 2
    assert registry.publish_vector(first) == one
    assert registry.publish_vector(first, metrics={"gain": 1.0}).version == 3  # other statements, shared blobs
    assert registry.publish_vector(second, version=2) == two
    blobs = registry.store.blobs()
    for other in (first, make_vector(seed=3)):
        with pytest.raises(InputError, match="helpful@2 exists with other content, and a version never changes"):
            registry.publish_vector(other, version=2)
    assert registry.store.blobs() == blobs
    assert registry.resolve("helpful@2") == two
    assert registry.versions("helpful") == [1, 2, 3]


def test_another_reader_sees_every_write(root: str, open_registry: Callable[..., Registry], make_vector: Make) -> None:
    writer, reader = open_registry(root), open_registry(root, "other-cache")
    published = writer.publish_vector(make_vector())
    assert reader.resolve("helpful") == published
    writer.set_alias("helpful", "production", 1, "good enough")
    assert reader.resolve("helpful@production") == published
    assert load_vector(reader.fetch("helpful@production")).digest() == published.digest


def test_aliases_keep_their_history(registry: Registry, make_vector: Make) -> None:
    registry.publish_vector(make_vector(seed=1))
    registry.publish_vector(make_vector(seed=2))
    registry.set_alias("helpful", "production", 2, "best on held-out prompts")
    move = registry.set_alias("helpful", "production", 1, "refusals went up", creator="ada", request="r1")
    assert registry.set_alias("helpful", "production", 1, "refusals went up", request="r1") == move
    assert registry.resolve("helpful@production").version == 1
    assert registry.aliases("helpful") == {"production": 1}
    history = registry.alias_history("helpful", "production")
    assert [(m.previous, m.version, m.reason) for m in history] == [
        (None, 2, "best on held-out prompts"),
        (2, 1, "refusals went up"),
    ]
    registry.set_alias("helpful", "production", None, "nothing is good enough")
    assert registry.aliases("helpful") == {}
    with pytest.raises(InputError, match="no vector helpful@production; there are versions 1 to 2"):
        registry.resolve("helpful@production")
    assert len(registry.alias_history("helpful", "production")) == 3


def test_tags_and_search(registry: Registry, make_vector: Make) -> None:
    registry.publish_vector(make_vector("helpful", 1), notes="trained on the small world")
    registry.publish_vector(make_vector("helpful", 2))
    registry.publish_vector(make_vector("harmless", 3, base="blake3:" + "c" * 64))
    registry.set_tags("helpful@1", {"stage": "candidate", "owner": "ada"}, "looks good")
    registry.set_tags("helpful@1", {"stage": "shipped"}, "was good")

    def found(**query: object) -> list[str]:
        return [version.ref for version in registry.list_vectors(**query)]  # type: ignore[arg-type]

    assert found() == ["harmless@1", "helpful@1", "helpful@2"]
    assert found(newest_only=True) == ["harmless@1", "helpful@2"]
    assert found(text="SMALL world") == ["helpful@1"]
    assert found(tags={"stage": "shipped"}) == ["helpful@1"]
    assert found(tags={"owner": "ada"}) == []
    assert found(base_fingerprint=BASE, form="full") == ["helpful@1", "helpful@2"]
    assert registry.tags("helpful@1") == {"stage": "shipped"}
    assert registry.tags("helpful@2") == {}


def test_presets_pin_versions(registry: Registry, make_vector: Make) -> None:
    helpful, harmless = (
        registry.publish_vector(make_vector("helpful", 1)),
        registry.publish_vector(make_vector("harmless", 2)),
    )
    preset = registry.publish_preset(
        "cautious", {"helpful@1": 0.5, "harmless@1": 1.0}, metrics={"front": [1, 2]}, reason="knee of the front"
    )
    assert preset.ref == "cautious@1"
    assert (
        registry.publish_preset(
            "cautious", {"helpful@1": 0.5, "harmless@1": 1.0}, metrics={"front": [1, 2]}, reason="knee of the front"
        )
        == preset
    )
    assert preset.fingerprint == serving_fingerprint(BASE, {harmless.digest: 1.0, helpful.digest: 0.5})
    registry.publish_vector(make_vector("helpful", 3))  # a newer version does not move the preset
    assert registry.resolve_preset("cautious").coefficients == {"helpful@1": 0.5, "harmless@1": 1.0}

    bolder = registry.publish_preset("cautious", {"helpful@2": 0.8, "harmless@1": 0.9}, reason="more help")
    registry.set_alias("cautious", "production", 1, "what serves", subject="presets")
    assert registry.resolve_preset("cautious") == bolder
    assert registry.resolve_preset("cautious@production") == preset
    assert [p.ref for p in registry.list_presets()] == ["cautious@2"]


def test_served_fingerprints_are_found_again(registry: Registry, make_vector: Make) -> None:
    registry.publish_vector(make_vector())
    served = registry.record_served({"helpful@1": 0.25}, base_fingerprint=BASE)
    assert registry.record_served({"helpful@1": 0.25}, base_fingerprint=BASE) == served
    assert registry.served(served.fingerprint) == served
    assert registry.served("blake3:" + "0" * 64) is None
    with pytest.raises(InputError, match="was made for base"):
        registry.record_served({"helpful@1": 0.25}, base_fingerprint="blake3:" + "d" * 64)


def test_fingerprints_mean_weights_not_names() -> None:
    a, b = "blake3:" + "1" * 64, "blake3:" + "2" * 64
    fingerprint = serving_fingerprint(BASE, {a: 0.5, b: 1.0})
    assert fingerprint == serving_fingerprint(BASE, {b: 1, a: 0.5})
    assert serving_fingerprint(BASE, {a: 0.5, b: 0.0}) == serving_fingerprint(BASE, {a: 0.5, b: -0.0})
    assert (
        len({fingerprint, serving_fingerprint(a, {a: 0.5, b: 1.0}), serving_fingerprint(BASE, {a: 1.0, b: 0.5})}) == 3
    )
    with pytest.raises(InputError, match="finite"):
        serving_fingerprint(BASE, {a: float("nan")})


BAD_NAMES = ["", "..", "a/b", "../a", "a\\b", "a..b", "a\n", "a b", "\x00", "é", ".a", "a.", "@", "a@b", "x" * 10_000]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:8]))
def test_bad_names_change_nothing(
    name: str, tmp_path: Path, open_registry: Callable[..., Registry], make_vector: Make
) -> None:
    registry = open_registry(tmp_path / "store")
    folder = make_vector()
    with pytest.raises(InputError) as error:
        registry.publish_vector(folder, name=name)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    for call in (registry.resolve, registry.resolve_preset, registry.versions, registry.release):
        if name == "a@b" and call in (registry.resolve, registry.resolve_preset):
            continue
        with pytest.raises(InputError):
            call(name)
    with pytest.raises(InputError):
        registry.set_alias("helpful", name, 1, "why not")
    assert not (tmp_path / "store").exists()


def test_what_is_no_vector_changes_nothing(tmp_path: Path, root: str, registry: Registry, make_vector: Make) -> None:
    poisoned = make_vector(seed=1)
    tensors = {"layer.weight": torch.full((4, 4), float("nan"))}
    with safe_open(poisoned / "vector.safetensors", "pt") as file:
        header = file.metadata()
    (poisoned / "vector.safetensors").unlink()
    save_file(tensors, poisoned / "vector.safetensors", header)
    pickled = make_vector(seed=2)
    (pickled / "extra.bin").write_bytes(b"\x80\x04.")
    nested = make_vector(seed=3)
    (nested / "more").mkdir()
    cut = make_vector(seed=4)
    (cut / "vector.safetensors").write_bytes((cut / "vector.safetensors").read_bytes()[:-7])
    for folder, message in [
        (poisoned, "NaN or infinity"),
        (pickled, "'extra.bin' does not belong to a vector"),
        (nested, "'more' does not belong"),
        (cut, "not a sound safetensors file"),
        (tmp_path / "nowhere", "no such file or folder"),
    ]:
        with pytest.raises(InputError, match=message):
            registry.publish_vector(folder)
    good = make_vector(seed=5)
    for call, message in [
        (lambda: registry.publish_vector(good, metrics={"gain": float("nan")}), "finite"),
        (lambda: registry.publish_vector(good, metrics={"gain": torch.ones(1)}), "plain"),
        (lambda: registry.publish_vector(good, version=0), "whole number"),
        (lambda: registry.publish_vector(good, notes="a\x07b"), "control characters"),
        (lambda: registry.publish_vector(good, recipe={"x": object()}), "plain"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert registry.list_vectors() == []
    assert registry.store.blobs() == {}


def test_bad_requests_are_refused(registry: Registry, make_vector: Make) -> None:
    registry.publish_vector(make_vector("helpful", 1, recipe={"beta": 0.1}))
    registry.publish_vector(make_vector("other-base", 2, base="blake3:" + "c" * 64))
    cased, changed = make_vector("Helpful", 3), make_vector("helpful", 4, recipe={"beta": 0.1})
    for call, message in [
        (lambda: registry.resolve("helpful@2"), "there are versions 1 to 1"),
        (lambda: registry.resolve("helpless"), "there are: helpful, other-base"),
        (lambda: registry.set_alias("helpful", "production", 2, "why"), "no vector helpful@2"),
        (lambda: registry.set_alias("helpful", "latest", 1, "why"), "always the newest"),
        (lambda: registry.set_alias("helpful", "7", 1, "why"), "starting with a letter"),
        (lambda: registry.set_alias("helpful", "production", 1, ""), "reason"),
        (lambda: registry.set_alias("helpful", "production", None, "why"), "none to remove"),
        (lambda: registry.publish_preset("p", {}, reason="r"), "at least one"),
        (lambda: registry.publish_preset("p", {"helpful": 1.0}, reason="r"), "pinned version such as 'helpful@1'"),
        (lambda: registry.publish_preset("p", {"helpful@1": float("inf")}, reason="r"), "not a finite number"),
        (lambda: registry.publish_preset("p", {"helpful@1": "1"}, reason="r"), "not a finite"),  # type: ignore[dict-item]
        (lambda: registry.publish_preset("p", {"helpful@1": 1, "other-base@1": 1}, reason="r"), "different base"),
        (lambda: registry.publish_vector(cased), "differs only in case"),
        (lambda: registry.publish_vector(changed, recipe={"beta": 0.2}), "cannot be changed"),
        (lambda: registry.set_tags("helpful@1", {"a b": "x"}, "r"), "tag"),
        (lambda: registry.set_tags("helpful", {"a": "x"}, "r"), "pinned version"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
    assert [version.ref for version in registry.list_vectors()] == ["helpful@1", "other-base@1"]
    assert registry.list_presets() == []


def test_roots_that_are_no_registry(tmp_path: Path, open_registry: Callable[..., Registry], bucket_root: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    for root, message in [
        (tmp_path / "photos", "not a registry"),
        ("gopher://host/x", "give a folder or s3"),
        ("s3://", "names no place"),
    ]:
        with pytest.raises(InputError, match=message):
            open_registry(root)
    with pytest.raises(InputError, match="there are: none yet"):
        open_registry(tmp_path / "empty").resolve("helpful")
    assert not (tmp_path / "empty").exists()
    with pytest.raises(InputError) as error:
        open_registry(bucket_root).resolve("helpful")
    assert "hush" not in str(error.value)


def test_only_publishing_creates_a_registry(
    root: str, open_registry: Callable[..., Registry], make_vector: Callable[..., Path]
) -> None:
    """Reading, holding, releasing and maintenance of a path without a registry leave nothing there."""
    with pytest.raises(InputError, match="no registry here"):
        open_registry(root, create=False)
    registry = open_registry(root)
    changes: dict[str, Callable[[], object]] = {
        "hold": lambda: registry.hold("replica-1", []),
        "release": lambda: registry.release("replica-1"),
        "retire": lambda: registry.retire("helpful@1", "old"),
        "gc": lambda: registry.gc(apply=True),
        "alias": lambda: registry.set_alias("helpful", "production", 1, "good"),
        "tags": lambda: registry.set_tags("helpful@1", {"team": "a"}, "r"),
        "record": lambda: registry.record_served({}, base_fingerprint=BASE),
    }
    for name, change in changes.items():
        with pytest.raises(InputError):
            change()
        assert registry.store.children("") == [], name
    assert registry.list_vectors() == []
    registry.publish_vector(make_vector())
    assert open_registry(root, create=False).resolve("helpful").version == 1


def test_a_registry_offers_every_operation_of_its_catalog_and_no_other_can_be_asked_for(registry: Registry) -> None:
    offered = {
        name for name in vars(Registry) if getattr(vars(Registry)[name], "__wrapped__", 0) is getattr(Catalog, name, 1)
    }
    assert offered == set(OPERATIONS)
    methods = {name for name in vars(Catalog) if not name.startswith("_")}
    assert methods - offered == {"perform", "all_vectors"}
    with pytest.raises(InputError, match="no method '__init__'"):
        registry.catalog.perform("__init__", (), {})

"""Bundles from strangers: whatever is in them, the importer gets one clear line and its disk stays as it was."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.registry.records import canonical
from prefvec_ray.registry.statements import wrong_statements
from prefvec_ray.vectors import load_vector

Make = Callable[..., Path]
Open = Callable[..., Registry]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def home(tmp_path: Path, open_registry: Open) -> Registry:
    """Where the bundles come from."""
    return open_registry(tmp_path / "home", "home-cache")


@pytest.fixture
def abroad(tmp_path: Path, open_registry: Open) -> Registry:
    """Where they are imported."""
    return open_registry(tmp_path / "abroad", "abroad-cache")


@pytest.fixture
def bundle(home: Registry, make_vector: Make, tmp_path: Path) -> Path:
    folder = make_vector("helpful", 1)
    (folder / "README.md").write_text("About this vector.")
    home.publish_vector(folder)
    home.publish_vector(make_vector("harmless", 2))
    home.publish_preset("cautious", {"helpful@1": 0.5}, reason="knee of the front")
    return home.export_bundle(tmp_path / "good.prefvec", ["helpful@1", "harmless@1"], presets=["cautious"])


def members(bundle: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(bundle) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]


def packed(index: object, blobs: list[tuple[str, bytes]], path: Path) -> Path:
    """A bundle whose index has a right digest, whatever it says."""
    body = index if isinstance(index, bytes) else canonical(index)
    line = b'{"blake3":"%s","record":%s}\n' % (blake3(body).hexdigest().encode(), body)
    with tarfile.open(path, "w:") as tar:
        for name, data in [("bundle.json", line), *blobs]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def forged(bundle: Path, change: Change, blobs: Callable[[str, bytes], tuple[str, bytes]] | None = None) -> Path:
    (_, index), *rest = members(bundle)
    record = json.loads(index)["record"]
    change(record)
    return packed(record, [blobs(*blob) if blobs else blob for blob in rest], bundle.with_name("forged.prefvec"))


def refuse(registry: Registry, bundle: Path, says: str) -> None:
    """The import raises one line, and neither publishes nor stages anything."""
    with pytest.raises(InputError, match=says) as caught:
        registry.import_bundle(bundle)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert registry.names() == registry.names("presets") == []
    assert not (Path(registry.store.uri) / "blobs").exists()


NAMES = [
    "../../outside",
    "/outside.json",
    "..",
    ".checked",
    "",
    "a/b.json",
    "a\\b.json",
    "C:evil.json",
    "x\n.json",
    "x\x1b[2J.json",
    "model.bin",
    "code.py",
    "x" * 200 + ".json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_that_is_more_than_a_name_is_refused(bundle: Path, abroad: Registry, name: str) -> None:
    outside = bundle.parent / "outside"
    outside.write_text("mine")

    def change(record: dict[str, Any]) -> None:
        for vector in record["vectors"]:
            vector["files"][0]["name"] = name

    refuse(abroad, forged(bundle, change), r"vectors\.\d\.files\.0\.name: file name .* rename the file")
    assert outside.read_text() == "mine"


def test_two_files_of_one_name_are_refused(bundle: Path, abroad: Registry) -> None:
    """The second would be written through the first, which may be a link to the registry's own bytes."""

    def change(record: dict[str, Any]) -> None:
        for vector in record["vectors"]:
            if vector["name"] == "helpful":
                vector["files"][0]["name"] = vector["files"][1]["name"].upper().replace("SAFETENSORS", "safetensors")
                vector["files"][1]["name"] = vector["files"][0]["name"].lower()

    refuse(abroad, forged(bundle, change), "two have the same name")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../x"),
        ("name", "a b"),
        ("name", "x\x00"),
        ("version", 0),
        ("version", -1),
        ("version", 10**9),
        ("version", "1"),
        ("version", True),
        ("version", 1.5),
        ("digest", "sha256:" + "0" * 64),
        ("digest", "blake3:" + "0" * 64 + "\n"),
        ("base_fingerprint", "[/]"),
        ("form", "[/]"),
        ("form", "x\x1b[31m"),
        ("dtype", "float8"),
        ("preference", "harmless "),
        ("preference", "h\u0430rmless"),
        ("preference", "harm\u200bless"),
        ("created", 1e308),
        ("created", -1.0),
        ("created", "now"),
        ("creator", "ada\nroot"),
        ("license", "mit\nbase_model: other"),
        ("notes", "bell\x07"),
        ("notes", "\u202egnp.exe"),
        ("parents", {"positive": "| forged |"}),
        ("parents", {'"]; click x': "blake3:" + "0" * 64}),
        ("data_digest", "`\n# A heading"),
        ("rank", -1),
        ("rank", 10**9),
        ("epoch", -5),
        ("libraries", {"torch": "1\x1b]0;title\x07"}),
        ("metrics", {"gain": 10**400}),
        ("metrics", {"text": "x" * 3_000_000}),
        ("files", []),
        ("unknown", 1),
    ],
)
def test_every_field_of_a_manifest_has_its_bounds(bundle: Path, abroad: Registry, field: str, value: object) -> None:
    change = lambda record: [vector.update({field: value}) for vector in record["vectors"]]  # noqa: E731
    refuse(abroad, forged(bundle, change), r"bundle\.json: not a sound BundleIndex \(vectors\.0\.")


@pytest.mark.parametrize(
    "metrics",
    [
        b'{"gain":NaN}',
        b'{"gain":1e999}',
        b'{"gain":' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"gain":' + b"9" * 5000 + b"}",
    ],
)
def test_numbers_that_json_lets_through_are_refused(bundle: Path, abroad: Registry, metrics: bytes) -> None:
    (_, index), *rest = members(bundle)
    body = index[86:-2].replace(b'"metrics":{}', b'"metrics":' + metrics)
    assert body != index[86:-2]
    refuse(abroad, packed(body, rest, bundle.with_name("forged.prefvec")), "not a sound BundleIndex")


@pytest.mark.parametrize("body", [b"[" * 100_000, b"null", b"[]", b"1" * 5000, b'{"format":1}', b"\xff\xfe", b""])
def test_an_index_that_is_no_record_is_refused(bundle: Path, abroad: Registry, body: bytes) -> None:
    refuse(abroad, packed(body, members(bundle)[1:], bundle.with_name("forged.prefvec")), r"bundle\.json")


def test_an_index_that_contradicts_itself_is_refused(bundle: Path, abroad: Registry) -> None:
    def twice(record: dict[str, Any]) -> None:
        record["vectors"].append(record["vectors"][0])

    def sizes(record: dict[str, Any]) -> None:
        record["vectors"][0]["files"] = record["vectors"][1]["files"][:1]
        record["vectors"][0]["files"] = [{**record["vectors"][1]["files"][0], "size": 1}]

    def lonely(record: dict[str, Any]) -> None:
        record["vectors"] = [vector for vector in record["vectors"] if vector["name"] != "helpful"]

    def rebased(record: dict[str, Any]) -> None:
        record["presets"][0]["base_fingerprint"] = "blake3:" + "9" * 64

    def unmatched(record: dict[str, Any]) -> None:
        record["presets"][0]["coefficients"]["harmless@1"] = 1.0

    def case(record: dict[str, Any]) -> None:
        record["vectors"].append({**record["vectors"][0], "name": record["vectors"][0]["name"].upper()})

    for change, says in [
        (twice, "one version twice"),
        (sizes, "two sizes"),
        (lonely, "which the bundle does not carry"),
        (rebased, "which the bundle does not carry"),
        (unmatched, "different references"),
        (case, "differs only in case"),
    ]:
        refuse(abroad, forged(bundle, change), says)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digest", "blake3:" + "1" * 64),
        ("preference", "harmful"),
        ("base_fingerprint", "blake3:" + "2" * 64),
        ("dtype", "bfloat16"),
        ("form", "low-rank"),
        ("rank", 3),
        ("parents", {"positive": "blake3:" + "3" * 64}),
        ("data_digest", "blake3:data"),
        ("precision", {"relative_error": 0.0}),
    ],
)
def test_a_manifest_that_contradicts_its_bytes_is_refused(
    bundle: Path, abroad: Registry, field: str, value: object
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["presets"] = []
        for vector in record["vectors"]:
            if vector["name"] == "helpful":
                vector[field] = value

    refuse(abroad, forged(bundle, change), f"helpful@1: {field}: the manifest says")


@pytest.mark.parametrize("damage", ["nan", "junk", "empty"])
def test_bytes_that_are_no_usable_vector_are_refused(
    bundle: Path, home: Registry, abroad: Registry, damage: str
) -> None:
    """Even where the manifest has the right digest of the wrong bytes."""
    good = (home.fetch("harmless@1") / "vector.safetensors").read_bytes()
    nan = good[:-64] + torch.full((16,), float("nan")).numpy().tobytes()
    data = {"nan": nan, "junk": b"\x80\x04junk" * 30, "empty": b""}[damage]
    digest = f"blake3:{blake3(data).hexdigest()}"
    old = home.resolve("harmless@1").files[0].digest

    def change(record: dict[str, Any]) -> None:
        for vector in record["vectors"]:
            if vector["name"] == "harmless":
                vector["files"][0].update(digest=digest, size=len(data))

    def swap(name: str, blob: bytes) -> tuple[str, bytes]:
        return (f"blobs/{digest[7:]}", data) if name.endswith(old[7:]) else (name, blob)

    refuse(abroad, forged(bundle, change, swap), "harmless@1: not a vector that can be used: ")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"x", b"g", b"L", b"K", b"V", b"Z"])
def test_members_that_are_no_plain_files_are_refused(bundle: Path, abroad: Registry, kind: bytes) -> None:
    """Links, devices, folders, pipes, sparse files, extended headers: none of them is needed."""
    whole = bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        first, second, *_ = tar.getmembers()
    odd = header(second.name, second.size, kind, "/etc/passwd" if kind in b"12" else "")
    path = bundle.with_name("odd.prefvec")
    path.write_bytes(whole[: second.offset] + odd + whole[second.offset + 512 :])
    refuse(abroad, path, "is no plain file")
    assert first.name == "bundle.json"


def test_a_small_file_cannot_promise_much(bundle: Path, abroad: Registry, tmp_path: Path) -> None:
    """Nothing is written for a bundle that is smaller than what its index declares."""

    def change(record: dict[str, Any]) -> None:
        for vector in record["vectors"]:
            vector["files"][0]["size"] = 1 << 40

    refuse(abroad, forged(bundle, change), "is smaller than the files that its index promises")
    path = tmp_path / "huge-member.prefvec"
    path.write_bytes(header("bundle.json", 1 << 40) + b"x" * 1024)
    refuse(abroad, path, r"bundle\.json|cut short")


def test_the_same_bytes_under_many_names_take_their_room_once(
    bundle: Path, home: Registry, abroad: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand names for the bytes of one file: unpacked, they are one file."""
    readme = next(file for file in home.resolve("helpful@1").files if file.name == "README.md")

    def change(record: dict[str, Any]) -> None:
        for vector in record["vectors"]:
            if vector["name"] == "helpful":
                copies = [{**readme.model_dump(), "name": f"{number}.md"} for number in range(1000)]
                vector["files"] = [*vector["files"], *copies]

    most = 0
    from prefvec_ray.registry import bundle as module

    def looking(manifest: Any, folder: Path) -> list[str]:
        nonlocal most
        inodes = {file.stat().st_ino for file in folder.iterdir()}
        most = max(most, len(inodes))
        return wrong_statements(manifest, folder)

    monkeypatch.setattr(module, "wrong_statements", looking)
    assert abroad.import_bundle(forged(bundle, change))["helpful@1"] == "helpful@1"
    assert most == 2
    assert len(list(abroad.fetch("helpful@1").glob("*.md"))) == 1001


def test_whatever_is_no_file_is_refused_at_once(abroad: Registry, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(InputError, match=r"plain file|No such file"):
            abroad.import_bundle(path)


def test_a_large_number_does_not_use_up_a_name(bundle: Path, abroad: Registry, make_vector: Make) -> None:
    def change(record: dict[str, Any]) -> None:
        record["presets"] = []
        for vector in record["vectors"]:
            vector["version"] = 999_999_999

    bad = forged(bundle, change)
    refuse(abroad, bad, "import with renumber")
    renamed = abroad.import_bundle(bad, renumber=True)
    assert renamed["helpful@999999999"] == "helpful@1"
    assert abroad.publish_vector(make_vector("helpful", 5)).version == 2
    with pytest.raises(InputError, match="a chosen number is at most 1000000"):
        abroad.publish_vector(make_vector("helpful", 6), version=999_999_999)
    assert abroad.publish_vector(make_vector("helpful", 7), version=1_000_000).version == 1_000_000
    assert abroad.publish_vector(make_vector("helpful", 8)).version == 1_000_001


def test_verify_finds_what_an_older_release_let_in(bundle: Path, home: Registry) -> None:
    """A manifest that was written to the store past every check."""
    stated = home.resolve("helpful@1")
    forged = stated.model_copy(update={"digest": home.resolve("harmless@1").digest})
    from prefvec_ray.registry.records import encode

    home.store.overwrite("vectors/helpful/1.json", encode(forged))
    findings = home.verify().findings
    assert ("wrong statement", "vectors/helpful/1.json") in {(f.kind, f.path) for f in findings}
    assert "digest: the manifest says" in next(f.detail for f in findings if f.kind == "wrong statement")
    assert not home.verify().sound


def test_a_cache_never_writes_over_a_file(bundle: Path, home: Registry, tmp_path: Path) -> None:
    """Were two files of one version one name, the store's own bytes would be at the other end of the link."""
    from prefvec_ray.registry.cache import _place

    blob = next((Path(home.store.uri) / "blobs").iterdir())
    target = tmp_path / "entry"
    _place(blob, target)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(FileExistsError):
        _place(other, target)
    assert home.verify().sound


def test_a_link_out_of_the_folder_is_not_published(home: Registry, make_vector: Make, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = make_vector("kind", 4)
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(InputError, match=r"README\.md: is a link to outside its folder"):
        home.publish_vector(folder)


def test_a_single_file_can_be_fetched_and_loaded(home: Registry, make_vector: Make, tmp_path: Path) -> None:
    file = (make_vector("kind", 4) / "vector.safetensors").rename(tmp_path / "my own vector.safetensors")
    published = home.publish_vector(file)
    assert load_vector(home.fetch(published.ref)).digest() == published.digest

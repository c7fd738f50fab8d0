"""Bundles between registries, and folders for the Hugging Face hub."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.vectors import load_vector

Make = Callable[..., Path]
Open = Callable[..., Registry]


@pytest.fixture
def bundle(tmp_path: Path, root: str, open_registry: Open, make_vector: Make) -> Path:
    """Two versions of `helpful`, one of `harmless` and the preset that uses some of them."""
    registry = open_registry(root)
    registry.publish_vector(make_vector("helpful", 1), metrics={"gain": 0.1}, creator="ada")
    registry.publish_vector(make_vector("helpful", 2, max_shard_size=512))
    registry.publish_vector(make_vector("harmless", 3))
    registry.publish_preset("cautious", {"helpful@2": 0.5, "harmless@1": 1.0}, reason="knee")
    return registry.export_bundle(tmp_path / "out.prefvec", ["helpful@1"], presets=["cautious"])


def test_a_bundle_moves_versions_as_they_are(bundle: Path, tmp_path: Path, root: str, open_registry: Open) -> None:
    here, there = open_registry(root), open_registry(tmp_path / "there", "there-cache")
    expected = {ref: ref for ref in ("harmless@1", "helpful@1", "helpful@2")} | {
        "preset:cautious@1": "preset:cautious@1"
    }
    assert there.import_bundle(bundle) == expected
    assert there.import_bundle(bundle) == expected  # nothing is published twice
    for ref in ("harmless@1", "helpful@1", "helpful@2"):
        mine, theirs = here.resolve(ref), there.resolve(ref)
        assert (mine.content, mine.created, mine.creator) == (theirs.content, theirs.created, theirs.creator)
        assert load_vector(there.fetch(ref)).digest() == mine.digest
    assert there.resolve_preset("cautious").fingerprint == here.resolve_preset("cautious").fingerprint
    assert there.verify().findings == ()


def test_a_taken_number_is_refused_or_moved(
    bundle: Path, tmp_path: Path, open_registry: Open, make_vector: Make
) -> None:
    there = open_registry(tmp_path / "there", "there-cache")
    there.publish_vector(make_vector("helpful", 9))
    with pytest.raises(InputError, match="helpful@1 is taken here by other content"):
        there.import_bundle(bundle)
    assert [version.ref for version in there.list_vectors()] == ["helpful@1"]
    renamed = there.import_bundle(bundle, renumber=True)
    assert renamed["helpful@1"] == "helpful@2"
    assert renamed["helpful@2"] == "helpful@3"
    assert there.resolve_preset("cautious").coefficients == {"helpful@3": 0.5, "harmless@1": 1.0}
    assert there.verify().sound


def test_bad_bundles_publish_nothing(bundle: Path, tmp_path: Path, open_registry: Open) -> None:
    good = bundle.read_bytes()

    def written(data: bytes) -> Path:
        path = tmp_path / "bad.prefvec"
        path.write_bytes(data)
        return path

    def tarred(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size, info.type = len(data), kind
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    with tarfile.open(bundle) as tar:
        stream = tar.extractfile("bundle.json")
        assert stream
        index = stream.read()
        last = tar.getmembers()[-1]
    flipped = bytearray(good)
    flipped[last.offset_data + last.size // 2] ^= 1
    in_index = bytearray(good)
    in_index[512 + 200] ^= 1
    for data in [
        b"",
        b"hello" * 1000,
        good[: len(good) // 2],
        good[: last.offset],
        bytes(flipped),
        bytes(in_index),
        tarred(("../../etc/passwd", b"x")),
        tarred(("bundle.json", index), ("../evil", b"x")),
        tarred(("bundle.json", index), ("/blobs/evil", b"x")),
        tarred(("bundle.json", b""), kind=tarfile.SYMTYPE),
        tarred(("bundle.json", index)),
    ]:
        there = open_registry(tmp_path / "there", "there-cache")
        with pytest.raises(InputError, match=r"bad\.prefvec"):
            there.import_bundle(written(data))
        assert there.list_vectors() == []
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name in ("evil", "etc")) == []


def test_an_export_is_whole_or_absent(bundle: Path, root: str, open_registry: Open, tmp_path: Path) -> None:
    registry = open_registry(root)
    with pytest.raises(InputError, match="exists already"):
        registry.export_bundle(bundle, ["helpful@1"])
    with pytest.raises(InputError, match="nothing to export"):
        registry.export_bundle(tmp_path / "empty.prefvec")
    with pytest.raises(InputError, match="no vector 'nope'"):
        registry.export_bundle(tmp_path / "nope.prefvec", ["nope"])
    assert not list(tmp_path.glob("*nope*")) + list(tmp_path.glob(".*prefvec*"))


def test_a_hugging_face_folder(tmp_path: Path, root: str, open_registry: Open, make_vector: Make) -> None:
    from huggingface_hub import ModelCard

    registry = open_registry(root)
    parents = {"positive": "blake3:" + "1" * 64, "negative": "blake3:" + "2" * 64}
    published = registry.publish_vector(
        make_vector("helpful", parents=parents, data_digest="blake3:" + "3" * 64),
        metrics={"gain": 0.2},
        license="apache-2.0",
        notes="Trained | on the tiny world.",
    )
    folder = registry.export_huggingface("helpful", tmp_path / "hub" / "helpful", base_model="org/tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "prefvec.json", "vector.safetensors"]
    assert load_vector(folder).digest() == published.digest
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == (
        "apache-2.0",
        "org/tiny",
        "prefvec-ray",
    )
    for text in (published.digest, "helpful@1", '"gain": 0.2', parents["negative"], "graph TD"):
        assert text in card.text
    assert open_registry(tmp_path / "there", "c2").publish_vector(folder).digest == published.digest
    with pytest.raises(InputError, match="not empty"):
        registry.export_huggingface("helpful", folder)


def test_a_model_card_cannot_be_forged(tmp_path: Path, open_registry: Open, make_vector: Make) -> None:
    """Notes, recipe and README come from the publisher: none of them speaks in the card's own voice."""
    import markdown

    registry = open_registry(tmp_path / "store")
    notes = "fine\n```\n## Digest\n| digest | `blake3:forged` |\n<script>alert(1)</script>\n````\n---\n# Reviewed by us"
    folder = make_vector("helpful", recipe={"x": "```\n# Reviewed by us"})
    (folder / "README.md").write_text("# Reviewed by us\n\nTrust me.\n")
    (folder / "prefvec.json").write_text('{"digest": "forged"}')
    version = registry.publish_vector(folder, notes=notes, license="apache-2.0")
    out = registry.export_huggingface("helpful", tmp_path / "hub")
    card = (out / "README.md").read_text()
    page = markdown.markdown(card.split("---\n", 2)[2], extensions=["tables", "fenced_code"])
    assert "Trust me" not in card
    assert page.count("<h1>") == 1
    assert "<script>" not in page
    assert "Reviewed by us</h" not in page
    assert "forged</code></td>" not in page
    assert version.digest in page
    assert (out / "README.publisher.md").read_text() == "# Reviewed by us\n\nTrust me.\n"
    assert version.digest in (out / "prefvec.json").read_text()
    assert load_vector(out).digest() == version.digest

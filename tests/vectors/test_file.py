"""The vector file: exact to the bit, and refused when it cannot be trusted."""

import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    Full,
    LowRank,
    PreferenceVector,
    VectorInfo,
    load_vector,
    save_vector,
    to_dtype,
    to_full,
    to_int8,
    to_low_rank,
    vector_from_state,
)

BASE = "blake3:" + "0" * 64


def example(dtype=torch.float32):
    delta = {"layer.weight": torch.randn(6, 4), "experts": torch.randn(3, 5, 4), "norm.weight": torch.randn(4)}
    recipe: dict[str, JsonValue] = {"method": "dpo", "beta": 0.1, "steps": [1, 2], "note": None}
    return vector_from_state(delta, preference="helpful", base_fingerprint=BASE, dtype=dtype, recipe=recipe)


FORMS = {
    "fp32": lambda vector: vector,
    "bf16": lambda vector: to_dtype(vector, torch.bfloat16),
    "fp16": lambda vector: to_dtype(vector, torch.float16),
    "int8": to_int8,
    "low-rank": lambda vector: to_low_rank(vector, rank=2),
    "low-rank bf16": lambda vector: to_low_rank(vector, rank=2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("shard", ["5GB", 100])
@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_is_the_same(form, shard, tmp_path):
    vector = FORMS[form](example())
    folder = save_vector(vector, tmp_path / "helpful", max_shard_size=shard)
    loaded = load_vector(folder).validate()
    assert loaded.info == vector.info
    assert loaded.names() == vector.names()
    assert loaded.digest() == vector.digest()
    for name in vector.names():
        assert torch.equal(loaded.dense(name), vector.dense(name))
        assert loaded.dense(name).dtype == torch.float32
        assert loaded.shape(name) == vector.shape(name)
    assert (folder / "vector.safetensors.index.json").exists() == (shard == 100)


@settings(deadline=None)  # a busy machine is no failure
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20),
)
def test_any_numbers_survive_storage(values, dtype, name):
    stored = torch.tensor(values).clamp(-1e38, 1e38).to(getattr(torch, dtype))
    info = VectorInfo(preference="p", form="full", dtype=dtype, base_fingerprint=BASE)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_vector(save_vector(PreferenceVector(info, {name: Full(stored)}), folder))
        entry = loaded.entry(name)
        assert isinstance(entry, Full)
        width = torch.int32 if dtype == "float32" else torch.int16
        assert torch.equal(entry.values.view(width), stored.view(width))  # signs of zero and denormals included


def test_files_are_readable_by_all_and_hold_nothing_else(tmp_path):
    folder = save_vector(example(), tmp_path, max_shard_size=100)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    with safe_open(folder / "vector-00001-of-00003.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["preference"] == "helpful"
    assert json.loads(metadata["recipe"])["beta"] == 0.1


def test_a_vector_never_changes(tmp_path):
    save_vector(example(), tmp_path)
    with pytest.raises(InputError, match="already holds a vector"):
        save_vector(example(), tmp_path)


def test_a_single_file_and_loading_lazily(tmp_path):
    folder = save_vector(example(), tmp_path / "v")
    entry = load_vector(folder / "vector.safetensors").entry("layer.weight")
    assert isinstance(entry, Full)
    again = load_vector(folder)
    first, second = again.entry("layer.weight"), again.entry("layer.weight")
    assert isinstance(first, Full)
    assert isinstance(second, Full)
    assert first.values.data_ptr() == second.values.data_ptr()


def test_names_that_look_like_factors(tmp_path):
    """Parameters may really be called foo.A, foo.B or foo.full: the form decides what a name means."""
    names = ["foo.A", "foo.B", "foo.full", "foo", "foo.A.A", "int8.scale"]
    vector = vector_from_state({name: torch.randn(4, 3) for name in names}, preference="p", base_fingerprint=BASE)
    for form, make in FORMS.items():
        other = make(vector)
        loaded = load_vector(save_vector(other, tmp_path / form))
        assert loaded.names() == sorted(names)
        assert all(torch.equal(loaded.dense(name), other.dense(name)) for name in names)
        assert all(isinstance(loaded.entry(name), LowRank) == form.startswith("low") for name in names)


def saved(tmp_path, **options):
    return save_vector(example(), tmp_path / "v", **options)


def with_header(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a safetensors header (8 bytes of length, JSON, then the numbers)."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def metadata(**changes):
    return lambda header: header | {"__metadata__": header["__metadata__"] | changes}


def offsets(name, begin, end):
    return lambda header: header | {name: header[name] | {"data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (offsets("layer.weight", 0, 96), "not a sound safetensors file"),  # overlaps its neighbour
        (offsets("layer.weight", 0, 2**60), "not a sound safetensors file"),
        (offsets("layer.weight", 96, 0), "not a sound safetensors file"),
        (lambda header: header | {"layer.weight": header["layer.weight"] | {"shape": [600, 4]}}, "not a sound"),
        (lambda header: header | {"layer.weight": header["layer.weight"] | {"dtype": "X9"}}, "not a sound"),
        (lambda header: {k: v for k, v in header.items() if k != "__metadata__"}, "not a preference vector"),
        (metadata(format_version="2"), "version '2'.*upgrade"),
        (metadata(recipe="{"), "metadata cannot be read"),
        (metadata(extra="field"), "metadata cannot be read"),
        (metadata(dtype="bfloat16"), "is not full form in bfloat16"),
        (metadata(dtype="int8"), "is not full form in int8"),
        (metadata(form="low-rank"), "is not low-rank form"),
        (metadata(form="sparse"), "metadata cannot be read"),
    ],
)
def test_tampered_headers_are_refused(change, named, tmp_path):
    folder = saved(tmp_path)
    with_header(folder / "vector.safetensors", change)
    with pytest.raises(InputError, match=named):
        load_vector(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_files_are_refused(kept, tmp_path):
    file = saved(tmp_path) / "vector.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        load_vector(file)


def test_absurd_header_length_is_refused(tmp_path):
    file = saved(tmp_path) / "vector.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        load_vector(file)


@pytest.mark.parametrize(
    "target",
    [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "C:\\x.safetensors",
        "model.bin",
        "a" * 999 + ".safetensors",
    ],
)
def test_an_index_that_points_elsewhere_is_refused(target, tmp_path):
    folder = saved(tmp_path, max_shard_size=100)
    index = folder / "vector.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layer.weight"] = target
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="points to"):
        load_vector(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    folder = saved(tmp_path, max_shard_size=100)
    (folder / "vector.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="not a safetensors index"):
        load_vector(folder)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path):
    folder = saved(tmp_path, max_shard_size=100)
    index = folder / "vector.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["layer.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="disagree about 'ghost'"):
        load_vector(folder)
    (folder / content["weight_map"]["ghost"]).unlink()
    with pytest.raises(InputError, match="missing"):
        load_vector(folder)


def test_shards_of_two_vectors_are_refused(tmp_path):
    folder = saved(tmp_path, max_shard_size=100)
    with_header(folder / "vector-00002-of-00003.safetensors", metadata(preference="harmless"))
    with pytest.raises(InputError, match="not of one vector"):
        load_vector(folder)


def test_links_to_outside_are_refused(tmp_path):
    folder = saved(tmp_path)
    elsewhere = (folder / "vector.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "vector.safetensors").symlink_to(elsewhere)
    with pytest.raises(InputError, match="link to outside"):
        load_vector(folder)
    (folder / "vector.safetensors").unlink()
    os.link(elsewhere, folder / "vector.safetensors")  # hard links, as a cache makes them, are the file itself
    assert load_vector(folder).digest() == example_digest(elsewhere)


def example_digest(file):
    return load_vector(file).digest()


@pytest.mark.parametrize("name", ["vector.bin", "vector.pt", "vector.pkl", "vector.pth", "vector.ckpt"])
def test_pickles_are_refused_by_name(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pickle"):
        load_vector(file)
    with pytest.raises(InputError, match=f"found {name}, a pickle"):
        load_vector(tmp_path)


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        load_vector(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds neither"):
        load_vector(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a preference vector"):
        load_vector(tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        load_vector(tmp_path / "notes.txt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_validate_finds_what_is_not_finite(bad, tmp_path):
    folder = saved(tmp_path)
    file = folder / "vector.safetensors"
    with safe_open(file, framework="pt") as opened:
        kept = opened.metadata()
    tensors = load_file(file)
    tensors["experts"][1, 2, 3] = bad
    save_file(tensors, file, kept)
    vector = load_vector(folder)
    for check in (vector.validate, vector.validated_digest):
        with pytest.raises(InputError, match="'experts' holds NaN or infinity"):
            check()


@pytest.mark.parametrize("max_shard_size", ["5GB", 200])
def test_one_pass_gives_the_digest_and_every_byte_of_the_files_in_order(max_shard_size, tmp_path):
    vector = example()
    folder = save_vector(vector, tmp_path / "vector", max_shard_size=max_shard_size)
    seen: dict[str, bytes] = {}

    def gather(file: str, piece: memoryview) -> None:
        seen[file] = seen.get(file, b"") + bytes(piece)

    assert load_vector(folder).validated_digest(gather) == vector.validated_digest() == vector.digest()
    assert seen == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(seen) > 1 or max_shard_size == "5GB"


def test_entries_must_fit_the_form():
    vector = example()
    for changes in ({"form": "low-rank", "dtype": "bfloat16"}, {"dtype": "int8"}, {"dtype": "float16"}):
        with pytest.raises(InputError, match="has parts"):
            vector.replace(**changes)
    with pytest.raises(InputError, match="has parts"):
        vector.replace({"layer.weight": LowRank(torch.ones(2, 4), torch.ones(6, 2))})
    assert to_full(to_low_rank(vector, rank=4)).info.form == "full"
    with pytest.raises(InputError, match="does not change 'elsewhere'"):
        vector.dense("elsewhere")


def test_equal_vectors_are_equal_files(tmp_path):
    delta = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(3)}
    recipe = {f"setting {i}": "é\n" * i for i in range(9)}
    folders = []
    for i in range(4):
        vector = vector_from_state(delta, preference="helpful", base_fingerprint="blake3:00", recipe=recipe)
        folders.append(save_vector(vector, tmp_path / str(i)))
    contents = {(folder / "vector.safetensors").read_bytes() for folder in folders}
    assert len(contents) == 1
    assert load_vector(folders[0]).info.recipe == recipe

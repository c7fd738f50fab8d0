"""phi of two checkpoint folders, streamed: the numbers of the in-memory extraction, and the same refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import (
    Checkpoint,
    PrecisionWarning,
    fingerprint,
    load_vector,
    vector_from_checkpoints,
)
from prefvec_ray.vectors.stream import extract_from_checkpoints

Folders = tuple[Path, Path, Path]


@pytest.fixture
def folders(tmp_path: Path, tiny_model: Callable[..., Any]) -> Folders:
    """base, positive, negative: fp32, sharded differently; the last layer's norm is the same in all."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    for name, shards in (("positive", "20KB"), ("negative", "5GB")):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key != "model.norm.weight":
                    parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(tmp_path / name, max_shard_size=shards)
    return tmp_path / "base", tmp_path / "positive", tmp_path / "negative"


def extract(folders: Folders, **options: Any) -> Any:
    base, positive, negative = folders
    out = base.parent / "phi"
    return extract_from_checkpoints(
        positive, negative, out, base_folder=base, preference="helpful", **{"dtype": torch.float32, **options}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_and_the_lineage_are_those_of_the_extraction_in_memory(
    folders: Folders, dtype: torch.dtype
) -> None:
    base, positive, negative = folders
    streamed = extract(folders, dtype=dtype, data_digest="blake3:abc", recipe={"beta": 0.1}, max_shard_size="30KB")
    whole = vector_from_checkpoints(positive, negative, base=base, preference="helpful", dtype=dtype)
    assert streamed.digest() == whole.digest()
    assert "model.norm.weight" not in streamed
    assert len(list((base.parent / "phi").glob("vector-*-of-*.safetensors"))) > 1
    assert streamed.info.parents == {"positive": fingerprint(positive), "negative": fingerprint(negative)}
    assert streamed.info.base_fingerprint == fingerprint(base)
    assert (streamed.info.data_digest, streamed.info.recipe) == ("blake3:abc", {"beta": 0.1})
    assert streamed.info.precision["relative_error"] == pytest.approx(whole.info.precision["relative_error"], rel=0.02)
    assert load_vector(base.parent / "phi").validate().info == streamed.info


def test_a_vector_from_bf16_checkpoints_says_how_much_of_it_is_rounding(folders: Folders) -> None:
    start = {name: tensor.clone() for name, tensor in Checkpoint(folders[0]).items()}
    for folder in folders:
        weights = {name: (tensor * 0.1 + start[name] * 0.9).bfloat16() for name, tensor in Checkpoint(folder).items()}
        for file in folder.glob("model*"):
            file.unlink()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(PrecisionWarning, match="expected cosine with the true phi"):
        vector = extract(folders)
    rounding = vector.info.precision["rounding"]
    assert rounding["source_dtype"] == "bfloat16"
    with pytest.warns(PrecisionWarning):
        whole = vector_from_checkpoints(folders[1], folders[2], base=folders[0], preference="helpful")
    measured: Any = whole.info.precision["rounding"]
    exact = measured["expected_cosine"]
    assert rounding["expected_cosine"] == pytest.approx(exact, rel=0.05)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][3, 3] = float("nan")


def _infinity(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][0, 0] = float("-inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), r"lacks 'lm_head\.weight'"),
        (lambda w: w.update({"extra.weight": torch.ones(2)}), r"has 'extra\.weight'"),
        (lambda w: w.update({"lm_head.weight": torch.ones(64, 31)}), r"'lm_head\.weight' of the negative model"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].double()}), r"'lm_head\.weight' is torch\.float64"),
        (_nan, r"'lm_head\.weight' holds NaN or infinity"),
        (_infinity, r"'model\.embed_tokens\.weight' holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_without_output(
    folders: Folders, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit(folders[2], change)
    with pytest.raises(InputError, match=message):
        extract(folders)
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["base", "negative", "positive"]


def test_files_that_cannot_be_trusted_are_refused(folders: Folders) -> None:
    _, positive, negative = folders
    whole = (negative / "model.safetensors").read_bytes()
    (negative / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        extract(folders)
    (negative / "model.safetensors").rename(negative / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle"):
        extract(folders)
    (negative / "pytorch_model.bin").unlink()
    (negative / "model.safetensors").write_bytes(whole)
    index = positive / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "../negative/model.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"points to '\.\./negative"):
        extract(folders)


def test_equal_checkpoints_and_an_existing_vector_are_refused(folders: Folders) -> None:
    base, positive, _ = folders
    with pytest.raises(InputError, match="are equal"):
        extract((base, positive, positive))
    extract(folders)
    before = load_vector(base.parent / "phi").digest()
    with pytest.raises(InputError, match="already exists"):
        extract((base, positive, base))
    assert load_vector(base.parent / "phi").digest() == before


def test_a_change_too_large_for_its_dtype_is_refused(folders: Folders) -> None:
    edit(folders[2], lambda w: w["lm_head.weight"].mul_(1e9))
    with pytest.raises(InputError, match=r"'lm_head\.weight' .* overflows torch\.float16"):
        extract(folders, dtype=torch.float16)

"""A vector that two processes write together, and phi of two runs' deltas, streamed from such files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import PreferenceVector, VectorInfo, load_vector, subtract, subtract_deltas, vector_from_state
from prefvec_ray.vectors.extract import positive_only
from prefvec_ray.vectors.part_writer import PartWriter, write_index

BASE = "blake3:" + "0" * 64


def delta(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {f"layer.{number}.weight": torch.randn(8, 16) for number in range(5)}


def written(folder: Path, changes: dict[str, Tensor], *, polarity: str = "+", parts: int = 2) -> PreferenceVector:
    """By as many processes as `parts`, in shards of two entries."""
    info = VectorInfo(
        preference=f"helpful{polarity}", form="full", dtype="float32", base_fingerprint=BASE, data_digest="blake3:d"
    )
    folder.mkdir()
    writers = [PartWriter(folder, number, info, shard_size=1000) for number in range(parts)]
    for place, (name, change) in enumerate(changes.items()):
        writers[place % parts].add(name, change)
    write_index(folder, [writer.finish({"masters": "float32"}) for writer in writers])
    return load_vector(folder)


def test_the_parts_are_the_vector_that_one_process_writes(tmp_path):
    vector = written(tmp_path / "delta", delta(0))
    exact = vector_from_state(delta(0), preference="helpful+", base_fingerprint=BASE)
    assert vector.validated_digest() == exact.digest()
    assert vector.info.precision == {"masters": "float32"}
    files = sorted(path.name for path in (tmp_path / "delta").iterdir())
    assert files == [*(f"vector-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "vector.safetensors.index.json"]


def test_of_one_shard_there_is_no_index(tmp_path):
    changes = {"weight": torch.ones(2)}
    assert written(tmp_path / "delta", changes).dense("weight").tolist() == [1, 1]
    assert [path.name for path in (tmp_path / "delta").iterdir()] == ["vector.safetensors"]


def test_parts_that_nobody_joined_are_no_vector(tmp_path):
    info = VectorInfo(preference="helpful", form="full", dtype="float32", base_fingerprint=BASE)
    writer = PartWriter(tmp_path, 0, info, shard_size=1)
    writer.add("weight", torch.ones(2))
    for _ in range(2):
        with pytest.raises(InputError, match="holds neither"):
            load_vector(tmp_path)
        writer.finish({})
    with pytest.raises(InputError, match="changes no parameter"):
        write_index(tmp_path, [{}, {}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_deltas_of_any_size_are_subtracted_as_in_memory(tmp_path, dtype):
    """One run left a parameter alone, and another one changed alike in both."""
    plus, minus = delta(1), delta(2)
    del minus["layer.0.weight"]
    minus["layer.1.weight"] = plus["layer.1.weight"].clone()
    runs = written(tmp_path / "plus", plus), written(tmp_path / "minus", minus, polarity="-", parts=3)
    for name, (positive, negative) in {"there": runs, "back": runs[::-1], "alone": (runs[0], None)}.items():
        if negative is None:
            exact = positive_only(positive, preference="helpful", dtype=dtype)
        else:
            exact = subtract(positive, negative, preference="helpful", dtype=dtype)
        streamed = subtract_deltas(
            positive, negative, tmp_path / name, preference="helpful", dtype=dtype, precision={"more": 1}
        )
        assert streamed.digest() == exact.digest()
        if negative is not None:
            assert "layer.1.weight" not in streamed
        assert streamed.info.precision.pop("sampled") == (5 if negative is None else 4) * 8 * 16
        assert streamed.info.precision == pytest.approx(exact.info.precision | {"more": 1})
        assert streamed.info.model_copy(update={"precision": {}}) == exact.info.model_copy(update={"precision": {}})


def test_deltas_that_make_no_vector_are_refused(tmp_path):
    one = written(tmp_path / "one", delta(1))
    cases = {
        "changes no parameter": one,
        "not of one base model": written(tmp_path / "shape", {"layer.0.weight": torch.ones(3, 4)}),
        "NaN or infinity": written(tmp_path / "nan", {"layer.0.weight": torch.full((8, 16), torch.nan)}),
        "expected full, float32": one.replace(dtype="bfloat16", entries={}),
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=message):
            subtract_deltas(one, other, tmp_path / "phi", preference="helpful")
        assert not (tmp_path / "phi").exists()

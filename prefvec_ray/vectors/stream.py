"""phi = theta+ - theta- of two checkpoints of any size, in one streamed pass: as fast as `cp`, in bounded memory."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue
from torch import Tensor

from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import check_preference
from prefvec_ray.vectors.checkpoint import Checkpoint
from prefvec_ray.vectors.entries import FLOAT_DTYPES, Full, dtype_name
from prefvec_ray.vectors.extract import (
    check_same_base,
    check_same_parameters,
    check_same_shape,
    of_one_run,
    of_two_runs,
)
from prefvec_ray.vectors.file import STEM, PreferenceVector, VectorInfo, load_vector, to_metadata
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.fused import FusedMerge, Segment
from prefvec_ray.vectors.precision import RoundingStats, StorageLoss
from prefvec_ray.vectors.writer import Index, Progress, ShardWriter

SAMPLE = 1 << 20  # numbers that precision is measured on, spread over all parameters
BLOCK = 4096
UNKNOWN = f"blake3:{'0' * 64}"  # holds a fingerprint's place in the header until it is computed


def extract_from_checkpoints(
    positive_folder: str | Path,
    negative_folder: str | Path,
    out: str | Path,
    *,
    base_folder: str | Path,
    preference: str,
    dtype: torch.dtype = torch.bfloat16,
    data_digest: str = "",
    recipe: Mapping[str, JsonValue] | None = None,
    base_fingerprint: str | None = None,
    parents: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreferenceVector:
    """Write phi = theta+ - theta- (arXiv 2504.20106, section 3) as a vector folder, and open it.

    The numbers are those of `vector_from_checkpoints`: one fp32 subtraction and one rounding to `dtype`. Parameters
    that are equal in both checkpoints are left out; how the three folders are sharded makes no difference. Precision is
    measured on a sample of about a million numbers, with a PrecisionWarning where rounding dominates. `out` appears
    complete or not at all. `base_fingerprint`, and `parents` ({"positive": fingerprint, "negative": fingerprint}), skip
    hashing folders whose fingerprints are known.

    Raises InputError for parameters that are missing, extra or misshapen against the base, two equal checkpoints, an
    existing `out`, files that cannot be trusted, and (without any output) for NaN, infinity and overflow of `dtype`.
    """
    check_preference(preference)
    dtype_name(dtype)
    folders = {"positive": positive_folder, "negative": negative_folder}
    base, plus, minus = (dict(Checkpoint(folder)) for folder in (base_folder, *folders.values()))
    if not (changed := _changed(base, plus, minus)):
        raise InputError(f"{positive_folder} and {negative_folder} are equal; give checkpoints of two runs")
    precision, rounding = _precision(plus, minus, changed, dtype)
    info = VectorInfo(
        preference=preference,
        form="full",
        dtype=dtype_name(dtype),  # type: ignore[arg-type]
        base_fingerprint=base_fingerprint or UNKNOWN,
        parents=dict(parents or dict.fromkeys(folders, UNKNOWN)),
        data_digest=data_digest,
        recipe=dict(recipe or {}),
        precision=precision,
    )

    def lineage() -> dict[str, object]:
        found = parents or {polarity: fingerprint(folder) for polarity, folder in folders.items()}
        return {"base_fingerprint": base_fingerprint or fingerprint(base_folder), "parents": dict(found)}

    like = {name: plus[name].to("meta", dtype) for name in changed}
    _write(Path(out), like, plus, minus, info, lineage, max_shard_size, threads, progress)
    rounding.warn(preference)
    return load_vector(out)


def subtract_deltas(
    positive: PreferenceVector,
    negative: PreferenceVector | None,
    out: str | Path,
    *,
    preference: str,
    dtype: torch.dtype = torch.bfloat16,
    precision: Mapping[str, JsonValue] | None = None,
    max_shard_size: int | str = "5GB",
) -> PreferenceVector:
    """`subtract` of two runs' full deltas in fp32, of any size: written as a vector folder, and opened. With no
    `negative` it is `positive_only`.

    What storing costs is measured on a sample of about a million numbers. `out` appears complete or not at all.

    Args:
        precision: what else is known of how exact the vector is, for its `info.precision`.

    Raises:
        InputError: as `subtract`, and for deltas in another form or dtype.
    """
    runs = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    check_same_base(list(runs.values()))
    plus, minus = _changes(positive), {} if negative is None else _changes(negative)
    if negative is not None:
        for name in plus.keys() & minus.keys():
            check_same_shape(name, positive, negative)
    for state, other in ((plus, minus), (minus, plus)):
        for name in other.keys() - state.keys():  # what one run left alone is 0 there
            state[name] = torch.zeros(()).expand(other[name].shape)
    changed = [name for name in sorted(plus) if _differs(name, plus[name], minus[name])]
    if not changed:
        raise InputError(f"'{preference}' changes no parameter; nothing was trained, or the two runs are equal")
    measured, _ = _precision(plus, minus, changed, dtype)
    known = {"dtype": dtype_name(dtype), "precision": measured | dict(precision or {})}
    unknown = {"parents": dict.fromkeys(runs, UNKNOWN)}
    about = (
        of_one_run(positive, preference) if negative is None else of_two_runs(positive, negative, preference, "full")
    )
    info = about.model_copy(update=known | unknown)

    def lineage() -> dict[str, object]:
        return {"parents": {polarity: run.digest() for polarity, run in runs.items()}}

    like = {name: plus[name].to("meta", dtype) for name in changed}
    _write(Path(out), like, plus, minus, info, lineage, max_shard_size)
    return load_vector(out)


def _changes(delta: PreferenceVector) -> dict[str, Tensor]:
    """Every parameter's change; InputError unless the delta is one of full parameters in fp32."""
    if (delta.info.form, delta.info.dtype) != ("full", "float32"):
        raise InputError(
            f"'{delta.info.preference}' is {delta.info.form} in {delta.info.dtype}; expected full, float32"
        )
    return {name: cast(Full, delta.entry(name)).values for name in delta.names()}


def _write(
    out: Path,
    like: Mapping[str, Tensor],
    plus: Mapping[str, Tensor],
    minus: Mapping[str, Tensor],
    info: VectorInfo,
    lineage: Callable[[], dict[str, object]],
    max_shard_size: int | str,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """The vector's folder, whole or not at all: the numbers, and beside that the digests of what they come from.

    Args:
        like: meta tensors of what is stored.
        lineage: computes fields of `info` that are not known yet.
    """
    with (
        new_folder(out) as folder,
        ShardWriter(
            folder, STEM, like, max_shard_size=max_shard_size, threads=threads, metadata=to_metadata(info)
        ) as writer,
        ThreadPoolExecutor(1) as aside,  # hashing takes processors where writing waits for the disk
    ):
        hashed = aside.submit(lineage)
        writer.write(partial(_difference, plus, minus), progress)
        writer.finish(to_metadata(info.model_copy(update=hashed.result())))


def _difference(
    plus: Mapping[str, Tensor], minus: Mapping[str, Tensor], name: str, index: Index, scratch: Tensor
) -> Tensor:
    """plus - minus of a part of one parameter, into `scratch`. InputError where a number is not finite in its dtype."""
    segment = Segment(name, scratch, plus[name][index], ((0, Full(minus[name][index])),))
    if FusedMerge([segment], threads=1).run([-1.0]) is not None:
        wrong = f"holds NaN or infinity, or its change overflows {scratch.dtype}"
        raise InputError(f"'{name}' {wrong}; train the run again")
    return scratch


def _changed(base: Mapping[str, Tensor], plus: Mapping[str, Tensor], minus: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that are not equal in both. InputError unless both have exactly the base's."""
    for which, state in (("positive", plus), ("negative", minus)):
        check_same_parameters(base, state, which)
    return [name for name in plus if _differs(name, plus[name], minus[name])]


def _differs(name: str, plus: Tensor, minus: Tensor) -> bool:
    if not plus.is_floating_point():
        if not torch.equal(plus, minus):
            raise InputError(f"'{name}' is {plus.dtype} and differs; a vector holds floating-point changes only")
        return False
    for theta in (plus, minus):
        if theta.dtype not in FLOAT_DTYPES.values():
            raise InputError(f"'{name}' is {theta.dtype}; expected checkpoints in {', '.join(FLOAT_DTYPES)}")
    # Almost always the first numbers tell; reading all of both files would cost as much as the extraction.
    first = slice(0, BLOCK)
    return not (
        torch.equal(plus.reshape(-1)[first], minus.reshape(-1)[first])
        and plus.dtype == minus.dtype
        and torch.equal(plus, minus)
    )


def _precision(
    plus: Mapping[str, Tensor], minus: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, JsonValue], RoundingStats]:
    """What `VectorInfo.precision` says, from blocks spread evenly over every parameter, as many as its share."""
    total = sum(plus[name].numel() for name in names)
    loss, rounding = StorageLoss(), RoundingStats()
    for name in names:
        pair = [state[name].reshape(-1) for state in (plus, minus)]
        blocks = -(-min(SAMPLE, total) * pair[0].numel() // (total * BLOCK))
        last = max(0, pair[0].numel() - BLOCK)
        starts = [i * last // max(1, blocks - 1) for i in range(blocks)]
        sample = [torch.cat([flat[start : start + BLOCK] for start in starts]) for flat in pair]
        exact = sample[0].float() - sample[1].float()
        loss.update(name, Full(exact), Full(exact.to(dtype)))
        if any(torch.finfo(part.dtype).bits < 32 for part in sample):
            rounding.update(*sample)
    measured = {"rounding": rounding.report()} if rounding.elements else {}
    return loss.report() | measured | {"sampled": min(SAMPLE, total)}, rounding

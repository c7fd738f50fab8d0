"""phi = theta+ - theta- of two checkpoints of any size, in one streamed pass: as fast as `cp`, in bounded memory."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import check_preference
from prefvec_ray.vectors.checkpoint import Checkpoint
from prefvec_ray.vectors.entries import FLOAT_DTYPES, Full
from prefvec_ray.vectors.extract import check_same_parameters
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
    base, plus, minus = (dict(Checkpoint(folder)) for folder in (base_folder, positive_folder, negative_folder))
    for which, state in (("positive", plus), ("negative", minus)):
        check_same_parameters(base, state, which)
    names = {value: name for name, value in FLOAT_DTYPES.items()}
    if dtype not in names:
        raise InputError(f"cannot store a vector in {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
    changed = [name for name in plus if _differs(name, plus[name], minus[name])]
    if not changed:
        raise InputError(f"{positive_folder} and {negative_folder} are equal; give checkpoints of two runs")
    precision, rounding = _precision(plus, minus, changed, dtype)
    info = VectorInfo(
        preference=preference,
        form="full",
        dtype=names[dtype],  # type: ignore[arg-type]
        base_fingerprint=base_fingerprint or UNKNOWN,
        parents=dict(parents or dict.fromkeys(("positive", "negative"), UNKNOWN)),
        data_digest=data_digest,
        recipe=dict(recipe or {}),
        precision=precision,
    )

    def produce(name: str, index: Index, scratch: Tensor) -> Tensor:
        theta_minus = Full(minus[name][index])
        segment = Segment(name, scratch, plus[name][index], ((0, theta_minus),))
        if FusedMerge([segment], threads=1).run([-1.0]) is not None:
            raise InputError(f"'{name}' holds NaN or infinity, or its change overflows {dtype}; train the run again")
        return scratch

    def lineage() -> dict[str, object]:
        sources = dict(parents or {"positive": fingerprint(plus), "negative": fingerprint(minus)})
        return {"base_fingerprint": base_fingerprint or fingerprint(base), "parents": sources}

    like = {name: torch.empty(plus[name].shape, dtype=dtype, device="meta") for name in changed}
    start = partial(ShardWriter, max_shard_size=max_shard_size, threads=threads, metadata=to_metadata(info))
    with (
        new_folder(Path(out)) as folder,
        start(folder, STEM, like) as writer,
        ThreadPoolExecutor(1) as aside,  # hashing takes processors where writing waits for the disk
    ):
        hashed = aside.submit(lineage)
        writer.write(produce, progress)
        writer.finish(to_metadata(info.model_copy(update=hashed.result())))
    if rounding.elements:
        rounding.warn(preference)
    return load_vector(out)


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

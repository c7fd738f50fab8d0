"""Taking a preference vector: from fp32 deltas of two runs, from checkpoints, from LoRA adapters."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import check_preference
from prefvec_ray.vectors.checkpoint import state_of
from prefvec_ray.vectors.entries import (
    Entry,
    Form,
    Full,
    Int8,
    LowRank,
    added,
    cast,
    dtype_name,
    form_of,
    is_finite,
    scaled,
)
from prefvec_ray.vectors.file import PreferenceVector, VectorInfo
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.precision import COSINE_WARNING, PrecisionWarning, RoundingStats, StorageLoss

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path


def vector_from_state(
    delta: Mapping[str, Tensor],
    *,
    preference: str,
    base_fingerprint: str,
    dtype: torch.dtype = torch.float32,
    parents: Mapping[str, str] | None = None,
    data_digest: str = "",
    recipe: Mapping[str, JsonValue] | None = None,
) -> PreferenceVector:
    """A full-form vector of `{checkpoint parameter name: change}`, stored in `dtype`.

    Meant for `theta_run - theta_base` in fp32, taken before any rounding. Parameters that did not change are left out.
    Raises InputError for NaN or infinity, numbers that are not floating, one tensor under two names (tied weights: give
    them once, as `checkpoint_state` does), a delta that is zero everywhere, or values that overflow `dtype`.
    """
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in sorted(delta.items()):
        if not tensor.is_floating_point():
            raise InputError(f"'{name}' is {tensor.dtype}; a preference vector holds floating-point changes only")
        twin = seen.setdefault((tensor.data_ptr(), tensor.shape), name)
        if twin != name and tensor.numel():
            raise InputError(f"'{twin}' and '{name}' are one tied tensor; give it once, under its checkpoint name")
    info = VectorInfo(
        preference=check_preference(preference),
        form="full",
        dtype="float32",
        base_fingerprint=base_fingerprint,
        parents=dict(parents or {}),
        data_digest=data_digest,
        recipe=dict(recipe or {}),
    )
    entries: dict[str, Entry] = {name: Full(tensor.detach()) for name, tensor in delta.items()}
    return stored_as(info, entries, dtype)


def vector_from_checkpoints(
    positive: Source,
    negative: Source,
    *,
    base: Source,
    preference: str,
    dtype: torch.dtype = torch.bfloat16,
    data_digest: str = "",
    recipe: Mapping[str, JsonValue] | None = None,
) -> PreferenceVector:
    """phi = theta+ - theta- of two full models (live, folders, or state dicts under checkpoint names).

    With `negative` the base itself this is a run's delta. `info.precision["rounding"]` says how much of phi is the
    rounding of sources that are not fp32, and a PrecisionWarning is given where that matters. Everything is held in
    memory; `extract_from_checkpoints` does the same for folders of any size. Raises InputError for parameters that are
    missing, extra or misshapen against the base, and for NaN or infinity.
    """
    base_state, plus, minus = state_of(base), state_of(positive), state_of(negative)
    for which, state in (("positive", plus), ("negative", minus)):
        check_same_parameters(base_state, state, which)
    stats = RoundingStats()
    entries: dict[str, Entry] = {}
    for name in sorted(plus):
        theta_plus, theta_minus = plus[name].detach(), minus[name].detach()
        if not theta_plus.is_floating_point():
            continue
        wide = torch.promote_types(torch.promote_types(theta_plus.dtype, theta_minus.dtype), torch.float32)
        entries[name] = Full((theta_plus.to(wide) - theta_minus.to(wide)).float())
        # The base is exact by definition, so a delta's only rounding is the run's own.
        theta_minus = theta_minus.float() if negative is base else theta_minus
        if torch.finfo(theta_plus.dtype).bits < 32 or torch.finfo(theta_minus.dtype).bits < 32:
            stats.update(theta_plus, theta_minus)
    info = VectorInfo(
        preference=check_preference(preference),
        form="full",
        dtype="float32",
        base_fingerprint=fingerprint(base_state),
        parents={"positive": fingerprint(plus), "negative": fingerprint(minus)},
        data_digest=data_digest,
        recipe=dict(recipe or {}),
        precision={"rounding": stats.report()} if stats.elements else {},
    )
    stats.warn(preference)
    return stored_as(info, entries, dtype)


def check_same_parameters(base: Mapping[str, Tensor], state: Mapping[str, Tensor], which: str) -> None:
    """InputError by name for a parameter of `state` that is missing, extra or misshapen against the base."""
    for name in sorted(set(base) - set(state)):
        raise InputError(f"the {which} model lacks '{name}', which the base has; is it of this base?")
    for name in sorted(set(state) - set(base)):
        raise InputError(f"the {which} model has '{name}', which the base lacks; is it of this base?")
    for name in base:
        if base[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} but the base's {tuple(base[name].shape)}"
            raise InputError(f"'{name}' of the {which} model is {shapes}; is it of this base?")


def subtract(
    positive: PreferenceVector,
    negative: PreferenceVector,
    *,
    preference: str,
    dtype: torch.dtype = torch.bfloat16,
) -> PreferenceVector:
    """phi = theta+ - theta- from the two runs' deltas over one base (arXiv 2504.20106, section 3), stored in `dtype`.

    A parameter that only one run changed counts as 0 in the other. Two low-rank entries stay exact, with rank r+ + r-.
    The recipe keeps both runs' recipes; the data digest is kept where both agree. Raises InputError for two bases,
    shapes that differ, NaN or infinity, and two runs that are equal. Warns (PrecisionWarning) when the deltas were not
    kept in fp32 and their rounding is a large part of phi.
    """
    check_same_base([positive, negative])
    entries: dict[str, Entry] = {}
    for name in sorted(set(positive.names()) | set(negative.names())):
        minus = scaled(negative.entry(name), -1.0) if name in negative else None
        plus = positive.entry(name) if name in positive else None
        if plus is not None and minus is not None:
            check_same_shape(name, positive, negative)
        present = [entry for entry in (plus, minus) if entry is not None]
        entries[name] = added(present[0], present[1]) if len(present) == 2 else scaled(present[0], 1.0)
    runs = {"positive": positive, "negative": negative}
    info = of_two_runs(positive, negative, preference, form_of(entries))
    info = info.model_copy(update={"parents": {polarity: run.digest() for polarity, run in runs.items()}})
    vector = stored_as(info, entries, dtype)
    rounding = {polarity: run.info.precision for polarity, run in runs.items() if _noise(run)}
    if not rounding:
        return vector
    # Independent roundings of the two deltas: |error|^2 = sum of (relative error of a run x its norm)^2.
    noise = sum(_noise(run) ** 2 * energy(run) for run in runs.values())
    cosine = 1 / math.sqrt(1 + noise / max(energy(vector), 1e-300))
    if cosine < COSINE_WARNING:
        message = f"vector '{preference}': its runs' deltas were rounded, expected cosine with phi {cosine:.2f}"
        warnings.warn(f"{message}; keep the deltas in fp32", PrecisionWarning, stacklevel=2)
    return vector.replace(precision=vector.info.precision | {"sources": rounding, "expected_cosine": cosine})


def of_two_runs(positive: PreferenceVector, negative: PreferenceVector, preference: str, form: Form) -> VectorInfo:
    """What phi = theta+ - theta- says about itself, but for its parents' digests and what storing it costs."""
    runs = {"positive": positive, "negative": negative}
    same_data = positive.info.data_digest == negative.info.data_digest
    return VectorInfo(
        preference=check_preference(preference),
        form=form,
        dtype="float32",
        base_fingerprint=positive.info.base_fingerprint,
        data_digest=positive.info.data_digest if same_data else "",
        recipe={
            polarity: run.info.recipe | ({} if same_data else {"data_digest": run.info.data_digest})
            for polarity, run in runs.items()
        },
    )


def check_same_shape(name: str, positive: PreferenceVector, negative: PreferenceVector) -> None:
    """InputError where both runs change a parameter, and it is not the same one."""
    plus, minus = tuple(positive.shape(name)), tuple(negative.shape(name))
    if plus != minus:
        raise InputError(
            f"'{name}' is {plus} in '{positive.info.preference}' but {minus} in '{negative.info.preference}'; they are "
            "not of one base model"
        )


def positive_only(run: PreferenceVector, *, preference: str, dtype: torch.dtype = torch.bfloat16) -> PreferenceVector:
    """phi = theta+ - theta_base: the positive run's delta as a vector of its own, stored in `dtype`.

    Half the training of `subtract`, and about half as long. The recipe says so and keeps the run's.
    """
    info = of_one_run(run, preference).model_copy(update={"parents": {"positive": run.digest()}})
    return stored_as(info, run.entries, dtype)


def of_one_run(positive: PreferenceVector, preference: str) -> VectorInfo:
    """What phi = theta+ - theta_base says about itself, but for its parent's digest and what storing it costs."""
    changes = {
        "preference": check_preference(preference),
        "dtype": "float32",
        "recipe": {"polarity": "positive", "positive": positive.info.recipe},
        "precision": {},
    }
    return positive.info.model_copy(update=changes)


def _noise(run: PreferenceVector) -> float:
    """Relative error of a run's delta: from its source's rounding and from its storage."""
    rounding, stored = run.info.precision.get("rounding"), run.info.precision.get("relative_error")
    cosine = rounding.get("expected_cosine") if isinstance(rounding, dict) else 1.0
    source = 1 - cosine**2 if isinstance(cosine, float) else 0.0
    return math.sqrt(source + (stored**2 if isinstance(stored, float) else 0.0))


def energy(vector: PreferenceVector) -> float:
    """|phi|^2 over all parameters, in float64."""
    return sum(vector.entries[name].squared_norm() for name in vector.names())


def check_same_base(vectors: list[PreferenceVector]) -> None:
    """InputError unless all vectors belong to one base model."""
    for vector in vectors[1:]:
        if vector.info.base_fingerprint != vectors[0].info.base_fingerprint:
            raise InputError(
                f"vector '{vector.info.preference}' is of base {vector.info.base_fingerprint}, but"
                f" '{vectors[0].info.preference}' of {vectors[0].info.base_fingerprint}; use one base's"
            )


def stored_as(info: VectorInfo, entries: Mapping[str, Entry], dtype: torch.dtype) -> PreferenceVector:
    """Drop entries that are zero, round the rest to `dtype` and measure what that costs."""
    stored = dtype_name(dtype)
    loss = StorageLoss()
    kept: dict[str, Entry] = {}
    for name, exact in sorted(entries.items()):
        if not is_finite(exact):
            raise InputError(f"'{name}' of '{info.preference}' holds NaN or infinity; the run diverged, train it again")
        if is_zero(exact):
            continue
        kept[name] = cast(exact, dtype)
        if not is_finite(kept[name]):
            raise InputError(f"'{name}' of '{info.preference}' overflows {stored}; store it in bfloat16 or float32")
        loss.update(name, exact, kept[name])
    if not kept:
        raise InputError(f"'{info.preference}' changes no parameter; nothing was trained, or the two runs are equal")
    changes = {"dtype": stored, "precision": info.precision | loss.report()}
    return PreferenceVector(VectorInfo.model_validate(info.model_dump() | changes), kept)


def is_zero(entry: Entry) -> bool:
    """True only if phi is exactly zero by its numbers (a low-rank entry: one factor is)."""
    if isinstance(entry, LowRank):
        return not (entry.A_RI.any() and entry.B_OR.any())
    return not entry.values.any() if isinstance(entry, Full | Int8) else False

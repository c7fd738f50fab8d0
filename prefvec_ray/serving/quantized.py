"""A quantized base, and the model that it was made from.

A vector belongs to the base that it was trained on, by fingerprint. A quantized copy of that base has other bytes, and
nothing in it proves where they come from: the operator says so. What can be seen to contradict that is refused.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.serving.config import DIGEST

if TYPE_CHECKING:
    from transformers import AutoConfig

SAME = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""of a model's config: what quantization does not change"""


def is_quantized(base: Path) -> bool:
    """Whether the model's config names a quantization."""
    return getattr(_config(base), "quantization_config", None) is not None


def trained_base(base: Path, named: str | None) -> str:
    """Fingerprint of the model that vectors beside `base` were trained on: the base itself, or what it was quantized
    from, where that is `named` by its folder or its fingerprint.

    Raises InputError for a base that is not quantized, or that cannot have been made from that model.
    """
    from prefvec_ray.vectors import fingerprint  # brings torch, which the front does without

    if named is None:
        return fingerprint(base)
    if not is_quantized(base):
        raise InputError(f"quantized_from: {base} is not quantized (its config.json says nothing of it); leave it out")
    if named.startswith(DIGEST):
        if not re.fullmatch(DIGEST + "[0-9a-f]{64}", named):
            raise InputError(f"quantized_from: {named[:80]!a} is no fingerprint; expected {DIGEST} and 64 hex digits")
        return named
    if not Path(named).is_dir():
        raise InputError(f"quantized_from: {named} is no folder; give the folder of the model that was quantized")
    ours, theirs = _config(base), _config(Path(named))
    for field in SAME:
        if getattr(ours, field, None) != getattr(theirs, field, None):
            values = f"{getattr(ours, field, None)} here, {getattr(theirs, field, None)} there"
            raise InputError(f"quantized_from: {base} was not made from {named}: {field} is {values}")
    return fingerprint(named)


def _config(folder: Path) -> "AutoConfig":
    from transformers import AutoConfig  # brings torch too

    return from_pretrained(AutoConfig, folder, local_files_only=True)

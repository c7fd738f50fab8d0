"""A vector taken apart by depth or by module: each part a vector, and all parts together the vector, number for number.

    parts = split(load_vector("vectors/helpful"), "depth:3")     # depth1of3, depth2of3, depth3of3
    profile = depth_profile(len(parts), tilt=0.5)                # 0.5, 1, 1.5: later layers more

With one coefficient for every part a model is the one with the whole vector. A *profile* gives the parts coefficients
of their own: the preference's coefficient times a factor for each part.
"""

import re
from collections.abc import Callable

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import WHOLE
from prefvec_ray.vectors.entries import form_of
from prefvec_ray.vectors.file import PreferenceVector

MODULES = ("attention", "mlp", "other")
"""`other` holds norms, embeddings and the head."""

_LAYER = re.compile(r"\.(\d+)\.")
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|\.fc\d|experts|moe", re.IGNORECASE)
_BEFORE_LAYERS = re.compile(r"embed|\.wte\.|\.wpe\.", re.IGNORECASE)


def split(vector: PreferenceVector, by: str) -> dict[str, PreferenceVector]:
    """The parts of a vector by their labels; each parameter belongs to one part, with its numbers as they are.

    Args:
        by: `depth:N` for N parts of about equally many layers (`depth1of3` has the first layers and the embeddings,
            the last part the final norm and the head), or `module` (`attention`, `mlp`, `other`). Modules that the
            vector does not change have no part.

    Raises:
        InputError: another `by`, a vector that is a part itself, fewer layers than parts, or one part alone.
    """
    if WHOLE in vector.info.parents:
        raise InputError(f"'{vector.info.preference}' is a part of a vector already; split the whole one")
    labels, part_of = _by_depth(vector, by) if by.startswith("depth:") else _by_module(vector, by)
    names: dict[str, list[str]] = {label: [] for label in labels}
    for name in vector.names():
        names[part_of(name)].append(name)
    empty = [label for label in labels if not names[label]]
    if empty and by != "module":
        raise InputError(f"{by}: nothing of '{vector.info.preference}' is in {', '.join(empty)}; give fewer parts")
    labels = [label for label in labels if names[label]]
    if len(labels) < 2:
        raise InputError(f"{by}: all of '{vector.info.preference}' is in {labels[0]}, so there is nothing to split")
    digest = vector.digest()
    return {label: _part(vector, names[label], by, label, labels, digest) for label in labels}


def depth_profile(parts: int, tilt: float) -> list[float]:
    """The factors of `parts` parts by depth: from 1 - tilt at the first to 1 + tilt at the last, linear, of mean 1.

    LiNeS (Wang et al., arXiv 2410.17146, equation 3) scales layers so, with a factor that grows with depth.
    """
    return [1 + tilt * (2 * k / (parts - 1) - 1) for k in range(parts)]


def _part(
    vector: PreferenceVector, names: list[str], by: str, label: str, labels: list[str], digest: str
) -> PreferenceVector:
    entries = {name: vector.entries[name] for name in names}
    changes = {
        "form": form_of(entries),
        "parents": {WHOLE: digest},
        "recipe": vector.info.recipe | {"split": by, "part": label, "parts": labels},
        "precision": {},
    }
    return PreferenceVector(vector.info.model_validate(vector.info.model_dump() | changes), entries)


def _by_depth(vector: PreferenceVector, by: str) -> tuple[list[str], Callable[[str], str]]:
    count = by.removeprefix("depth:")
    if not re.fullmatch(r"[1-9]\d?", count) or count == "1":
        raise InputError(f"{by!r}: expected depth:N with 2 to 99 parts, such as depth:3")
    parts = int(count)
    found = {name: _LAYER.search(name) for name in vector.names()}
    layers = 1 + max((int(layer[1]) for layer in found.values() if layer), default=-1)
    if layers < parts:
        raise InputError(f"{by}: '{vector.info.preference}' changes {layers} layers; give at most as many parts")
    labels = [f"depth{k + 1}of{parts}" for k in range(parts)]

    def part_of(name: str) -> str:
        layer = found[name]
        if layer is not None:
            return labels[int(layer[1]) * parts // layers]
        return labels[0] if _BEFORE_LAYERS.search(name) else labels[-1]

    return labels, part_of


def _by_module(vector: PreferenceVector, by: str) -> tuple[list[str], Callable[[str], str]]:
    if by != "module":
        raise InputError(f"{by!r}: expected depth:N, such as depth:3, or module")

    def part_of(name: str) -> str:
        if _NORM.search(name):
            return "other"
        return "attention" if _ATTENTION.search(name) else "mlp" if _MLP.search(name) else "other"

    return list(MODULES), part_of

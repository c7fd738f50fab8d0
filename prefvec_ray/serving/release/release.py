"""What one deployment serves: the base and its vectors, each fixed to a version.

Every replica gets the same release, so an alias that moves later changes no running answer; a roll-out (`rollout.py`)
brings the next release to all of them, as another generation, and every request keeps the one that it started with.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import WHOLE
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.registry import PresetVersion, Registry, VectorVersion, open_registry, serving_fingerprint
from prefvec_ray.serving.access.policy import Policy, no_way_around, parts_of, policy_of
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.serving.quantized import is_quantized, trained_base
from prefvec_ray.serving.request import ReleaseId


@dataclass(frozen=True)
class ServedVector:
    """One preference of the endpoint and the exact version behind it."""

    ref: str
    digest: str
    form: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Release:
    """`vectors` by preference. Equal releases give equal weights at equal coefficients."""

    base_fingerprint: str
    vectors: Mapping[str, ServedVector]
    policy: Policy
    created: int
    """seconds since 1970 when it was resolved"""
    generation: int = 0
    """0 at deployment; every roll-out counts on"""
    named: Mapping[str, str] | None = None
    """the references that it was resolved from; None: the newest vectors of the base"""
    deployment: str = ""
    """that it is of"""
    quantized: str | None = None
    """fingerprint of the quantized copy of that base whose weights are served; None: the base itself is"""
    context: int | None = None
    """the most tokens that a prompt can have with this base, where that is known without loading it"""

    @property
    def served_base(self) -> str:
        """Fingerprint of the folder whose weights are served."""
        return self.quantized or self.base_fingerprint

    @property
    def id(self) -> ReleaseId:
        return self.deployment, self.generation

    def columns(self, coefficients: Coefficients) -> Coefficients:
        """The coefficients under names that also say which vector is meant. What an engine computes and caches under
        them belongs to those very vectors, whatever other generations call by the same preference."""
        return tuple((self.column(name), eta) for name, eta in coefficients)

    def column(self, preference: str) -> str:
        """Sorted as preferences are: a space comes before all that their names may hold."""
        return f"{preference} {self.vectors[preference].digest}"

    def fingerprint(self, coefficients: Coefficients) -> str:
        """Digest of everything that decides the weights behind an answer: base, vectors, coefficients."""
        total: dict[str, float] = {}
        for name, eta in coefficients:  # two names may stand for one vector: their coefficients add up
            digest = self.vectors[name].digest
            total[digest] = total.get(digest, 0.0) + eta
        return serving_fingerprint(self.served_base, total)

    def preset(self, preset: PresetVersion, policy: Policy | None = None) -> Coefficients:
        """The preset's coefficients under this endpoint's names; preferences that it leaves out are 0.

        Raises InputError where it was made for another base or other vectors than those served here, and
        PreferenceError where the policy (default: everybody's) forbids it: a preset is no way around a floor.
        """
        by_digest = {vector.digest: name for name, vector in self.vectors.items()}
        missing = sorted(ref for ref, digest in preset.vectors.items() if digest not in by_digest)
        if missing or preset.base_fingerprint != self.base_fingerprint:
            raise InputError(
                f"preset {preset.ref} was made with {', '.join(missing) or 'another base model'}, which this"
                " endpoint does not serve; choose another preset, or deploy with those vectors"
            )
        etas: dict[str, float] = {}
        for ref, eta in preset.coefficients.items():  # two references may stand for one vector: they add up
            name = by_digest[preset.vectors[ref]]
            etas[name] = etas.get(name, 0.0) + eta
        return (policy or self.policy).coefficients(dict.fromkeys(self.vectors, 0.0) | etas)


def resolve_release(config: ServingConfig) -> Release:
    """Resolve the config against base folder and registry.

    Raises InputError for a missing base, unknown or unfitting vectors, none at all, bounds for a preference that is not
    served, and whatever would let an anonymous caller below a floor.
    """
    from prefvec_ray.vectors import fingerprint  # brings torch, which the front does without

    if not config.base.is_dir():
        raise InputError(f"base: {config.base.absolute()} is no folder; give the base model's folder")
    served = fingerprint(config.base)
    base = trained_base(config.base, config.quantized_from)
    release = resolve(config, base, open_registry(config.registry))
    return replace(release, context=_context(config), quantized=served if base != served else None)


def check_unchanged(base: Path, base_fingerprint: str) -> None:
    """Raises InputError where the base is no longer what it was at deployment."""
    from prefvec_ray.vectors import fingerprint

    found = fingerprint(base)
    if found != base_fingerprint:
        raise InputError(
            f"base {base}: {found[:23]}… here, {base_fingerprint[:23]}… at deployment;"
            " put the same base on every node, or deploy again"
        )


def _context(config: ServingConfig) -> int | None:
    """The engine's context: see `Release.context`."""
    if config.engine.kind == "vllm":  # may extend a model's positions by settings of its own
        longest = config.engine.vllm.get("max_model_len")
        return longest if isinstance(longest, int) and longest > 0 else None  # vLLM's -1 is a choice of its own
    from transformers import AutoConfig

    from prefvec_ray.serving.engines.slots.cache import context_length

    return context_length(from_pretrained(AutoConfig, config.base, local_files_only=True))


def resolve(config: ServingConfig, base: str, registry: Registry) -> Release:
    """`resolve_release` where the base's fingerprint is known; without its context."""
    if config.vectors is None:
        versions = newest_vectors(registry, base)
    else:
        versions = {name: registry.resolve(ref) for name, ref in config.vectors.items()}
    if not versions:
        raise InputError(f"registry {config.registry}: no vectors for the base {config.base}; publish some first")
    for name, version in versions.items():
        if version.base_fingerprint != base:
            raise InputError(
                f"vectors: {version.ref} ({name}) belongs to base {version.base_fingerprint[:23]}…, {config.base} is"
                f" {base[:23]}…; use the base it was trained on{_if_quantized(config)}"
            )
        if config.engine.mode == "steered" and version.form != "low-rank":
            raise InputError(
                f"vectors: {version.ref} ({name}) is in {version.form} form, which the steered engine cannot add"
                " beside the weights; publish its low-rank form, or serve with mode: merged"
            )
    served = {n: ServedVector(v.ref, v.digest, v.form, dict(v.metrics)) for n, v in sorted(versions.items())}
    parts = parts_of(versions)
    policy = policy_of(config, list(served), parts)
    no_way_around(config.floors, versions, parts)
    release = Release(base, served, policy, int(time.time()), named=config.vectors)
    for name in config.anonymous.presets or ():
        try:
            release.preset(registry.resolve_preset(name))
        except InputError as error:
            raise InputError(f"anonymous.presets: {name!r} cannot be offered: {error}") from None
    return release


def _if_quantized(config: ServingConfig) -> str:
    if config.quantized_from or not is_quantized(config.base):
        return ""
    return ", or, since this one is quantized, name the model that it was made from as 'quantized_from'"


def newest_vectors(registry: Registry, base_fingerprint: str) -> dict[str, VectorVersion]:
    """The newest version of every vector of this base; deltas of single runs (`helpful+`) and parts are left out."""
    found = registry.list_vectors(base_fingerprint=base_fingerprint, newest_only=True)
    whole = [version for version in found if WHOLE not in version.parents]
    return {version.name: version for version in whole if not version.preference.endswith(("+", "-"))}

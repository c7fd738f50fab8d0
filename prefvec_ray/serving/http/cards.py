"""What an endpoint says of itself: its models, its preferences and presets, its health."""

from collections.abc import Mapping
from typing import Any, Literal

from openai.types import Model
from pydantic import BaseModel

from prefvec_ray.registry import PresetVersion
from prefvec_ray.serving.engines.base import Coefficients, EngineStatus
from prefvec_ray.serving.http.admission import Caller


class VectorCard(BaseModel):
    """One preference of `GET /v1/preferences`, or a part of one: what it is and what a caller may ask for."""

    preference: str
    vector: str
    """name and version in the registry"""
    digest: str
    min: float
    max: float
    default: float
    metrics: dict[str, Any]


class PresetCard(BaseModel):
    """One preset, under the model name that asks for it."""

    model: str
    version: int
    preferences: dict[str, float]
    fingerprint: str
    metrics: dict[str, Any]
    """the trade-off that was measured for it"""
    reason: str


class PreferencesCard(BaseModel):
    """`GET /v1/preferences`: what the caller that asks may have."""

    model: str
    base_fingerprint: str
    coefficients: Literal["free", "presets"]
    """whether this caller may ask for coefficients of its own, or for presets only"""
    preferences: list[VectorCard]
    presets: list[PresetCard]


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


def model_card(name: str, created: int) -> Model:
    return Model(id=name, created=created, object="model", owned_by="prefvec-ray")


class Health(BaseModel):
    """`GET /healthz`."""

    status: Literal["ok", "idle"]
    """idle: no replica runs, and none is needed now"""
    replicas: list[EngineStatus]
    """each engine's counters"""


def preferences_card(
    model: str, caller: Caller, presets: Mapping[str, tuple[PresetVersion, Coefficients]]
) -> PreferencesCard:
    """What this caller may have of the release that it was identified at, with these presets."""
    policy, release = caller.policy, caller.release
    vectors = [
        VectorCard(
            preference=name,
            vector=vector.ref,
            digest=vector.digest,
            metrics=dict(vector.metrics),
            **policy.ranges[policy.preference_of(name)].model_dump(),
        )
        for name, vector in release.vectors.items()
    ]
    cards = [
        PresetCard(
            model=f"{model}@{name}",
            version=preset.version,
            preferences=dict(coefficients),
            fingerprint=release.fingerprint(coefficients),
            metrics=preset.metrics,
            reason=preset.reason,
        )
        for name, (preset, coefficients) in presets.items()
    ]
    return PreferencesCard(
        model=model,
        base_fingerprint=release.base_fingerprint,
        coefficients=caller.allowance.coefficients,
        preferences=vectors,
        presets=cards,
    )

"""The section `prefvec` of vLLM's additional config: which vectors a server of vLLM's own has, and what may be asked.

Both sides read it: the front, which checks requests (`serving/vllm_plugin.py`), and the workers, which load vectors.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from prefvec_ray.common.config import Config, parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.registry import Registry, VectorVersion, open_registry
from prefvec_ray.serving.config import Range
from prefvec_ray.serving.quantized import trained_base
from prefvec_ray.vectors import PreferenceVector, load_vector
from prefvec_ray.vectors.live import check_base

SECTION = "prefvec"
"""of vLLM's `additional_config`"""
FIELD = "preferences"
"""of a request's `vllm_xargs`: its coefficients as a JSON object in a string"""


class PluginConfig(Config):
    """What is served: the section `prefvec` of vLLM's additional config. An endpoint's fields, and `columns`."""

    registry: str
    vectors: dict[Name, str]
    """name -> version such as `helpful@1`. Not an alias: vLLM's processes would look it up at different times"""
    ranges: dict[Name, Range] = {}
    default_range: Range = Range()
    quantized_from: str | None = None
    columns: PositiveInt | None = None
    """see `SteeringShape`"""


def parsed(section: dict[str, Any]) -> PluginConfig:
    """Raises InputError for what is wrong in it."""
    return parse_config(section, PluginConfig, source="additional config: prefvec")


def settings(vllm_config: Any) -> dict[str, Any]:
    """The section `prefvec` of the additional config, {} where there is none."""
    additional = vllm_config.additional_config
    section = additional.get(SECTION, {}) if isinstance(additional, dict) else {}
    if not isinstance(section, dict):
        raise InputError(f"additional config: '{SECTION}' is a mapping with 'registry' and 'vectors', got {section!r}")
    return section


def versions(config: PluginConfig) -> tuple[Registry, dict[str, VectorVersion]]:
    """The registry, and what the names stand for in it."""
    registry = open_registry(config.registry)
    found = {name: registry.resolve(ref) for name, ref in config.vectors.items()}
    for name, version in found.items():
        if config.vectors[name] != version.ref:
            given = config.vectors[name]
            raise InputError(f"prefvec.vectors: '{given}' is not one version; it is {version.ref} now: name that")
    return registry, found


def load_vectors(config: PluginConfig, model_config: Any) -> dict[str, PreferenceVector]:
    """The vectors of the section, for vLLM's base model."""
    from vllm.v1.engine.input_processor import InputProcessor

    if not getattr(InputProcessor.process_inputs, "prefvec", False):
        raise InputError("vLLM has not loaded the plugin 'prefvec': name it in VLLM_PLUGINS, or unset that variable")
    registry, found = versions(config)
    folders = {name: registry.fetch(version.ref) for name, version in found.items()}
    return opened(folders, trained_base(_folder(model_config), config.quantized_from))


def opened(folders: Mapping[str, str | Path], base_fingerprint: str) -> dict[str, PreferenceVector]:
    """The vectors in these folders. Raises InputError for one of another base."""
    vectors = {name: load_vector(folder) for name, folder in folders.items()}
    for vector in vectors.values():
        check_base(vector, base_fingerprint)
    return vectors


def salt(weights: Any) -> str:
    """Of vLLM's cached blocks: what is equal for equal weights only, as JSON."""
    return hashlib.blake2b(json.dumps(weights).encode(), digest_size=16).hexdigest()


def coefficients(params: Any) -> dict[str, float]:
    """Those of a request in the engine, without zeros; {} where it has none."""
    etas = ((params and params.extra_args) or {}).get(FIELD, {})
    return {name: eta for name, eta in etas.items() if eta}


def _folder(model_config: Any) -> Path:
    """The base's folder: a local one, or its copy in Hugging Face's cache."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision))

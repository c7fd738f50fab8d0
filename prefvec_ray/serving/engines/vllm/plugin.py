"""Preference vectors in plain `vllm serve`: vLLM's own server, with coefficients in the requests' `vllm_xargs`.

    vllm serve BASE --worker-cls prefvec_ray.serving.engines.vllm.worker.PreferenceWorker \\
        --additional-config '{"prefvec": {"registry": "runs/demo/registry", "vectors": {"helpful": "helpful@1"}}}'

`register` is an entry point in vLLM's group `vllm.general_plugins`, which vLLM calls in each of its processes. Without
`prefvec` in the additional config it does nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from prefvec_ray.common.config import Config, parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.registry import Registry, VectorVersion, open_registry
from prefvec_ray.serving.config import Range
from prefvec_ray.vectors import PreferenceVector, fingerprint, load_vector
from prefvec_ray.vectors.live import check_base

SECTION = "prefvec"
"""of vLLM's `additional_config`"""
FIELD = "preferences"
"""of a request's `vllm_xargs`: its coefficients as a JSON object in a string"""
BOUND = 3.4e38
_EXAMPLE = f"""a JSON object in a string: "{FIELD}": "{{\\"helpful\\": 0.5}}\""""


class PluginConfig(Config):
    """What is served: the section `prefvec` of vLLM's additional config. An endpoint's fields, and `columns`."""

    registry: str
    vectors: dict[Name, str]
    """name -> version such as `helpful@1`. Not an alias: vLLM's processes would look it up at different times"""
    ranges: dict[Name, Range] = {}
    default_range: Range = Range()
    columns: PositiveInt | None = None
    """see `SteeringShape`"""


class ServedVectors:
    """The vectors of a server, as its front knows them: names, digests and ranges."""

    def __init__(self, config: PluginConfig):
        if unknown := config.ranges.keys() - config.vectors.keys():
            raise InputError(f"prefvec.ranges: no vector is called {', '.join(sorted(unknown))}")
        self._digests = {name: version.digest for name, version in versions(config)[1].items()}
        self._ranges = {name: config.ranges.get(name, config.default_range) for name in config.vectors}

    def coefficients(self, asked: Any) -> dict[str, float]:
        """Those of a request, with defaults for what it does not name. Raises InputError for what may not be asked."""
        given = _mapping(asked) if asked is not None else {}
        for name, eta in given.items():
            if name not in self._ranges:
                raise InputError(f"no preference '{name}' is served here; there are: {', '.join(sorted(self._ranges))}")
            allowed = self._ranges[name]
            if not allowed.min <= eta <= allowed.max:
                raise InputError(f"'{name}' may be {allowed.min:g} to {allowed.max:g}, got {eta:g}")
        return {name: given.get(name, allowed.default) for name, allowed in self._ranges.items()}

    def salt(self, etas: Mapping[str, float], callers: str | None) -> str | None:
        """What separates cached blocks of different weights. At zeros it is the caller's own: these are the base's."""
        used = sorted((self._digests[name], eta) for name, eta in etas.items() if eta)
        if not used:
            return callers
        return hashlib.blake2b(json.dumps([used, callers]).encode(), digest_size=16).hexdigest()

    def admit(self, request: Any) -> None:
        """Put coefficients and salt into a request for vLLM's engine. Raises vLLM's error for a bad request."""
        from vllm.exceptions import VLLMValidationError

        params = request.sampling_params
        if params is None:
            return
        extra = dict(params.extra_args or {})
        try:
            if misplaced := sorted(self._ranges.keys() & extra.keys()):
                raise InputError(f"'{misplaced[0]}' stands beside it; write {_EXAMPLE}")
            etas = self.coefficients(extra.get(FIELD))
        except InputError as error:
            raise VLLMValidationError(f"vllm_xargs.{FIELD}: {error}", parameter="vllm_xargs") from None
        params.extra_args = {**extra, FIELD: etas}
        request.cache_salt = self.salt(etas, request.cache_salt)


def register() -> None:
    """Have vLLM's front read, check and salt each request before it goes to the engine."""
    from vllm.v1.engine.input_processor import InputProcessor

    start, process = InputProcessor.__init__, InputProcessor.process_inputs
    if getattr(process, "prefvec", False):
        return

    @wraps(start)
    def __init__(self: Any, *args: Any, **named: Any) -> None:  # noqa: N807
        start(self, *args, **named)
        section = settings(self.vllm_config)
        self.prefvec = served(section) if section and "shape" not in section else None

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **named: Any) -> Any:
        request = process(self, *args, **named)
        if self.prefvec:
            self.prefvec.admit(request)
        return request

    process_inputs.prefvec = True  # type: ignore[attr-defined]
    InputProcessor.__init__, InputProcessor.process_inputs = __init__, process_inputs


def served(section: dict[str, Any]) -> ServedVectors:
    """What a section says. Raises InputError for what is wrong in it."""
    return ServedVectors(_parsed(section))


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


def load_vectors(vllm_config: Any) -> dict[str, PreferenceVector]:
    """The vectors of the section, checked against vLLM's base model."""
    from vllm.v1.engine.input_processor import InputProcessor

    if not getattr(InputProcessor.process_inputs, "prefvec", False):
        raise InputError("vLLM has not loaded the plugin 'prefvec': name it in VLLM_PLUGINS, or unset that variable")
    config = _parsed(settings(vllm_config))
    registry, found = versions(config)
    base = fingerprint(_folder(vllm_config.model_config))
    vectors = {name: load_vector(registry.fetch(version.ref)) for name, version in found.items()}
    for vector in vectors.values():
        check_base(vector, base)
    return vectors


def coefficients(params: Any) -> dict[str, float]:
    """Those of a request in the engine, without zeros; {} where it has none."""
    etas = ((params and params.extra_args) or {}).get(FIELD, {})
    return {name: eta for name, eta in etas.items() if eta}


def _mapping(asked: Any) -> dict[str, float]:
    try:
        given = json.loads(asked) if isinstance(asked, str) else asked
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError(f"expected {_EXAMPLE}")
    for name, eta in given.items():
        if isinstance(eta, bool) or not isinstance(eta, int | float) or not -BOUND < eta < BOUND:
            raise InputError(f"'{name}' is no finite number of single precision")
    return {name: float(eta) for name, eta in given.items()}


def _parsed(section: dict[str, Any]) -> PluginConfig:
    return parse_config(section, PluginConfig, source="additional config: prefvec")


def _folder(model_config: Any) -> Path:
    """The base's folder: a local one, or its copy in Hugging Face's cache."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision))

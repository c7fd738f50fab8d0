"""Preference vectors in plain `vllm serve`: vLLM's own server, with coefficients in the requests' `vllm_xargs`.

    vllm serve BASE --worker-cls prefvec_ray.serving.engines.vllm.worker.PreferenceWorker \\
        --additional-config '{"prefvec": {"registry": "runs/demo/registry", "vectors": {"helpful": "helpful@1"}}}'

`register` is an entry point in vLLM's group `vllm.general_plugins`, which vLLM calls in each of its processes. Without
`prefvec` in the additional config it does nothing.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.policy import Policy
from prefvec_ray.serving.engines.vllm.section import FIELD, PluginConfig, parsed, salt, settings, versions

_EXAMPLE = f"""a JSON object of numbers in a string: "{FIELD}": "{{\\"helpful\\": 0.5}}\""""
_ASKED = TypeAdapter(dict[str, float], config=ConfigDict(strict=True))


class ServedVectors:
    """The vectors of a server, as its front knows them: names, digests and ranges."""

    def __init__(self, config: PluginConfig):
        if unknown := config.ranges.keys() - config.vectors.keys():
            raise InputError(f"prefvec.ranges: no vector is called {', '.join(sorted(unknown))}")
        self._digests = {name: version.digest for name, version in versions(config)[1].items()}
        self._policy = Policy({name: config.ranges.get(name, config.default_range) for name in config.vectors})

    def coefficients(self, asked: Any) -> dict[str, float]:
        """Those of a request, with defaults for what it does not name. Raises InputError for what may not be asked."""
        try:
            given = _ASKED.validate_json(asked) if isinstance(asked, str) else _ASKED.validate_python(asked)
        except ValidationError:
            raise InputError(f"expected {_EXAMPLE}") from None
        return dict(self._policy.coefficients(given))

    def salt(self, etas: Mapping[str, float], callers: str | None) -> str | None:
        """What separates cached blocks of different weights. At zeros it is the caller's own: these are the base's."""
        used = sorted((self._digests[name], eta) for name, eta in etas.items() if eta)
        return salt([used, callers]) if used else callers

    def admit(self, request: Any) -> None:
        """Put coefficients and salt into a request for vLLM's engine. Raises vLLM's error for a bad request."""
        from vllm.exceptions import VLLMValidationError

        params = request.sampling_params
        if params is None:
            return
        extra = dict(params.extra_args or {})
        try:
            if misplaced := sorted(self._digests.keys() & extra.keys()):
                raise InputError(f"'{misplaced[0]}' stands beside it; write {_EXAMPLE}")
            etas = self.coefficients(extra.get(FIELD, {}))
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
        self.prefvec = ServedVectors(parsed(section)) if section and "shape" not in section else None

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **named: Any) -> Any:
        request = process(self, *args, **named)
        if self.prefvec:
            self.prefvec.admit(request)
        return request

    process_inputs.prefvec = True  # type: ignore[attr-defined]
    InputProcessor.__init__, InputProcessor.process_inputs = __init__, process_inputs

"""vLLM's worker with preference vectors: `worker_cls`, which vLLM loads in each of its worker processes.

Steered, a request's coefficients are in its `SamplingParams.extra_args`, under `preferences`. Merged, the weights are
rewritten between turns.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from typing import Any

from vllm.platforms import current_platform

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.vllm import section
from prefvec_ray.serving.engines.vllm.shape import SteeringShape
from prefvec_ray.serving.engines.vllm.steering import SteeringBuffers
from prefvec_ray.vectors import PreferenceVector, merged_weights

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _PlatformWorker
elif current_platform.is_xpu():
    from vllm.v1.worker.xpu_worker import XPUWorker as _PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as _PlatformWorker


class PreferenceWorker(_PlatformWorker):
    """What `collective_rpc` may call begins with `prefvec_`. Each of these returns what is wrong with its input, or
    None: an exception would reach the caller as one of vLLM's own."""

    def __init__(self, vllm_config: Any, *args: Any, **named: Any):
        self._vectors: Mapping[str, PreferenceVector] = {}
        self._steering: SteeringBuffers | None = None
        settings = section.settings(vllm_config)
        self._shape: SteeringShape | None = None
        if settings and (vllm_config.lora_config or vllm_config.parallel_config.use_ubatching):
            raise InputError("preference vectors are not served beside LoRA adapters (enable_lora) or with dbo")
        if "shape" in settings:
            self._shape = SteeringShape.model_validate(settings["shape"])
        elif settings:
            config = section.parsed(settings)
            self._vectors = section.load_vectors(config, vllm_config.model_config)
            self._shape = SteeringShape.of(self._vectors.values(), config.columns)
            # What is compiled depends on the shape alone: other vectors of this shape find it again.
            vllm_config = copy(vllm_config)
            rest = {**vllm_config.additional_config, section.SECTION: {"shape": self._shape.model_dump(mode="json")}}
            vllm_config.additional_config = rest
        super().__init__(vllm_config, *args, **named)

    def load_model(self, **named: Any) -> None:
        super().load_model(**named)
        if self._shape is None:
            return
        tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        runner = self.model_runner
        self._steering = SteeringBuffers(runner.get_model(), self._shape, max(tokens, captured), runner.device)
        if self._vectors:
            self._steering.load(self._vectors)
            self._vectors = {}
        self._requests: dict[str, Mapping[str, float]] = {}
        self._prepared = False
        if self.use_v2_model_runner:
            state = runner.model_state
            state.prepare_inputs = _before(
                state.prepare_inputs, lambda batch, *_: self._prepare(batch.req_ids, batch.num_scheduled_tokens)
            )
        else:
            runner._prepare_inputs = _before(
                runner._prepare_inputs, lambda _, counts: self._prepare(runner.input_batch.req_ids, counts)
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._steering is None:
            return super().execute_model(scheduler_output)
        for name in scheduler_output.finished_req_ids:
            self._requests.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._requests[new.req_id] = section.coefficients(new.sampling_params)
        self._prepared = scheduler_output.total_num_scheduled_tokens == 0
        output = super().execute_model(scheduler_output)
        if not self._prepared:
            raise RuntimeError("this vLLM ran a step without its coefficients; install the version that is pinned")
        return output

    def _prepare(self, names: Any, counts: Any) -> None:
        assert self._steering is not None
        self._steering.set_step([(self._requests[n], int(c)) for n, c in zip(names, counts, strict=True)])
        self._prepared = True

    def prefvec_steer(self, folders: Mapping[str, str], base_fingerprint: str) -> str | None:
        """Know the vectors in these folders, by name, and no others."""
        assert self._steering is not None
        try:
            self._steering.load(section.opened(folders, base_fingerprint))
        except InputError as error:
            return str(error)
        return None

    def prefvec_hold(self, folders: Mapping[str, str], base_fingerprint: str) -> str | None:
        """Have these vectors ready for `prefvec_merge`."""
        try:
            self._vectors = section.opened(folders, base_fingerprint)
        except InputError as error:
            return str(error)
        return None

    def prefvec_merge(self, base: str, coefficients: Mapping[str, float]) -> str | None:
        """Rewrite the weights. The model may be in any state where this failed, until it succeeds again."""
        try:
            dtype = self.model_runner.model_config.dtype
            weights = merged_weights(base, self._vectors, coefficients, dtype=dtype)
            self.model_runner.reload_weights(weights_iterator=weights)
        except InputError as error:
            return str(error)
        return None


def _before(method: Callable[..., Any], first: Callable[..., None]) -> Callable[..., Any]:
    """`method`, with a call of `first` with the same arguments before it."""

    @wraps(method)
    def both(*args: Any, **named: Any) -> Any:
        first(*args, **named)
        return method(*args, **named)

    return both

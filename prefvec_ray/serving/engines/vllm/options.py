"""vLLM's engine as Ray Serve LLM starts it: what of its options an endpoint's settings decide."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import EngineConfig, ServingConfig
from prefvec_ray.vectors import Checkpoint

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

WORKER = "prefvec_ray.serving.engines.vllm.worker.PreferenceWorker"
BASE_IS_THERE = "prefvec_ray.serving.vllm_server.BaseIsThere"
PLACED = {"model", "served_model_name", "additional_config"}
"""options that are set where the model and its vectors are known"""


def llm_config(config: ServingConfig) -> LLMConfig:
    """The deployment of `config` for Ray Serve LLM. Its replicas add the vectors' shape.

    Raises InputError for options in `engine.vllm` that vLLM does not have or that are decided here, and where vLLM or
    what Ray Serve LLM needs beside it is not installed.
    """
    options = engine_options(config.base, config.engine)
    try:
        from ray.serve.llm import LLMConfig
    except ImportError as error:
        raise InputError(f"engine.kind: vllm needs ray[llm], which cannot be imported here ({error})") from None
    variables = environment(config.engine, cpu=not config.replicas.gpus)
    if config.traces:  # vLLM's own spans go where ours go
        options |= {"otlp_traces_endpoint": config.traces.endpoint}
        variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
    gpus, cpus, ranks = config.replicas.gpus, config.replicas.cpus, config.engine.ranks
    return LLMConfig(
        model_loading_config={"model_id": config.model, "model_source": str(config.base)},
        engine_kwargs=options,
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundles": [{"GPU": gpus / ranks}] * ranks if gpus else [{"CPU": cpus}]},
        deployment_config={"ray_actor_options": {"num_cpus": cpus if gpus else 0}},
        runtime_env={"env_vars": variables},
        callback_config={"callback_class": BASE_IS_THERE},
        # Each part of a stream goes on at once.
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def engine_options(base: str | Path, config: EngineConfig) -> dict[str, Any]:
    """vLLM's options, without those of `PLACED`. Raises InputError as `llm_config` does."""
    try:
        from vllm import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
    except ImportError as error:
        raise InputError(f"engine.kind: vllm needs vLLM, which cannot be imported here ({error}); install it") from None
    ours: dict[str, Any] = {
        "dtype": _stored_dtype(base) if config.dtype == "auto" else config.dtype,
        "max_num_seqs": config.max_batch,
        "stream_interval": config.stream_interval,
        "worker_cls": WORKER,
        # As the slot engine has it: free white space would let a weak model write nothing else.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        # OpenAI's defaults, whatever the model's folder recommends.
        "generation_config": "vllm",
        "override_generation_config": {"max_new_tokens": config.max_new_tokens},
        "enable_prompt_tokens_details": True,
    }
    known = {field.name for kind in (AsyncEngineArgs, FrontendArgs) for field in fields(kind)}
    wrong = sorted(name for name in config.vllm if name not in known or name in ours or name in PLACED)
    if wrong:
        raise InputError(f"engine.vllm: {', '.join(wrong)}: no option of this vLLM, or decided by the other settings")
    return ours | config.vllm


def environment(config: EngineConfig, *, cpu: bool) -> dict[str, str]:
    """Variables that vLLM's processes need; those that are set here already stay as they are."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    # vLLM's structural tags for tools are xgrammar's, which llguidance does not know. Without them the arguments of
    # named and required calls follow the tools' JSON schemas.
    wanted["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = "0"
    if cpu:  # else vLLM takes all of the machine's processors
        wanted |= {"OMP_NUM_THREADS": str(config.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        wanted["VLLM_USE_AOT_COMPILE"] = "0"  # the CPU build compiles anew where it should load that
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _stored_dtype(base: str | Path) -> str:
    """vLLM's own "auto" would halve fp32 weights."""
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    return str(dtype or next(iter(Checkpoint(base).values())).dtype).removeprefix("torch.")

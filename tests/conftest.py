"""What all tests share: one Ray cluster and an offline, quiet environment for every process it starts."""

import os
from collections.abc import Iterator

# Before torch, transformers or ray are imported by any test: their processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One cluster of 4 logical CPUs for the whole suite, in namespace `prefvec`; the value is its dashboard's URL."""
    import ray

    context = ray.init(num_cpus=4, namespace="prefvec", include_dashboard=True, log_to_driver=False)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()

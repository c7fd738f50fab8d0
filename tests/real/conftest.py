"""What `examples/gemma/run.sh` made of a real model; `make test-real` runs it first, and names its folder in RUNS."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefvec_ray.registry import open_registry
from prefvec_ray.vectors import PreferenceVector, load_vector

collect_ignore_glob = [] if "RUNS" in os.environ else ["test_*.py"]
# vLLM wants other versions than the rest: an environment of its own.
collect_ignore = ["test_gemma.py" if find_spec("vllm") else "test_on_vllm.py"]


@pytest.fixture(scope="session")
def runs() -> Path:
    return Path(os.environ["RUNS"])


@pytest.fixture(scope="session")
def base(runs: Path) -> Path:
    """The fine-tuned base of all vectors."""
    return Path(json.loads((runs / "gemma" / "training.json").read_text())["base"])


@pytest.fixture(scope="session")
def exported() -> dict[str, float]:
    """The coefficients that run.sh exports."""
    return {"helpful": 1.0, "harmless": 0.5}


@pytest.fixture(scope="session")
def vectors(runs: Path) -> dict[str, PreferenceVector]:
    registry = open_registry(str(runs / "gemma" / "registry"))
    return {name: load_vector(registry.fetch(f"{name}@1")) for name in ("helpful", "harmless")}


@pytest.fixture(scope="session")
def exact_logits(
    base: Path, vectors: dict[str, PreferenceVector]
) -> Callable[[Mapping[str, float], Sequence[int]], torch.Tensor]:
    """(1, tokens, vocabulary): logits of base + sum of eta phi, all in float64."""

    def of(etas: Mapping[str, float], tokens: Sequence[int]) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, eta in etas.items():
                for parameter in vectors[name].entries:
                    parameters[parameter].add_(vectors[name].dense(parameter).double(), alpha=eta)
            return model(torch.tensor([list(tokens)])).logits

    return of

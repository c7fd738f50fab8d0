"""What `examples/gemma/run.sh` made of a real model; `make test-real` runs it first, and names its folder in RUNS."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

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

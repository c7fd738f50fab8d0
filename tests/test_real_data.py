"""The same commands on real data and a real, very small Llama: HH-RLHF through training, vectors, merge, served answer.

Skipped where `../shared/data` is not there: the project ships no data of others.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from prefvec_ray.serving import ServingConfig, start, stop

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, new_cluster: Callable[..., AbstractContextManager[Any]]) -> Path:
    """`prefvec train` on jobs/configs/hh_stories260k.yaml made shorter: one preference, one epoch, short sequences; on
    a cluster of two nodes, one run on each."""
    cwd = tmp_path_factory.mktemp("hh")
    text = (ROOT / "jobs" / "configs" / "hh_stories260k.yaml").read_text()
    shorter = {
        "num_train_epochs: 3": "num_train_epochs: 1",
        "max_length: 512": "max_length: 256",
        "rows: 400": "rows: 800",
    }
    for before, after in shorter.items():
        assert before in text
        text = text.replace(before, after)
    lines = [line for line in text.splitlines() if not line.startswith("  harmless:")]
    (cwd / "hh.yaml").write_text("\n".join(lines))
    environment = {
        **os.environ,
        "HH_RLHF": str(SHARED / "preference"),
        "STORIES260K": str(SHARED / "models" / "stories260K"),
        "COLUMNS": "160",
    }
    command = [sys.executable, "-m", "prefvec_ray.cli", "train", "--config", "hh.yaml"]
    with new_cluster(num_cpus=1) as cluster:
        cluster.add_node(num_cpus=1)
        environment["RAY_ADDRESS"] = cluster.address
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (cwd / "printed.txt").write_text(done.stdout)
    return cwd


def test_margins_separate_on_held_out_pairs_in_the_right_directions(run):
    folder = run / "runs" / "hh-stories260k"
    positive, negative = json.loads((folder / "training.json").read_text())["runs"]
    assert positive["held_out"]["helpful"]["accuracy"] > 0.5 > negative["held_out"]["helpful"]["accuracy"]
    assert positive["held_out"]["helpful"]["margin"] > 0 > negative["held_out"]["helpful"]["margin"]
    assert positive["held_out"]["helpful"]["loss"] < 0.6931  # where it starts: the base against itself
    for result in (positive, negative):
        assert result["kl"] > 0
        assert (folder / "tensorboard" / result["spec"]["key"]).is_dir()
    printed = (run / "printed.txt").read_text()
    assert "800 pairs (hh-rlhf)" in printed
    assert "left out, their prompt alone fills max_length 256" in printed


def test_the_vector_is_merged_and_answers(run, ray_cluster):
    folder = run / "runs" / "hh-stories260k"
    command = [sys.executable, "-m", "prefvec_ray.cli", "export", "--base", str(folder / "base")]
    words = ["--registry", str(folder / "registry"), "--set", "helpful@1=0.5", "--out", str(run / "merged")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Human" in (run / "merged" / "chat_template.jinja").read_text()

    config = ServingConfig(model="stories", base=folder / "base", registry=str(folder / "registry"))
    try:
        client = OpenAI(base_url=start(config, port=8017), api_key="none")
        answers = {
            eta: client.chat.completions.create(
                model="stories",
                messages=[{"role": "user", "content": "Tell me about a cat."}],
                temperature=0,
                max_tokens=24,
                extra_body={"preferences": {"helpful": eta}},
            )
            for eta in (-1.0, 0.0, 1.0)
        }
    finally:
        stop()
    assert all(answer.choices[0].message.content for answer in answers.values())
    assert len({answer.system_fingerprint for answer in answers.values()}) == 3

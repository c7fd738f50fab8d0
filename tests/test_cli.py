"""What people type: help that answers at once, and mistakes that cost one line and no time."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from prefvec_ray.cli import main

CONFIG = "name: job\nbase: {base}\npreferences: {{helpful: {{data: {data}}}}}\n"


def prefvec(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefvec_ray.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def refused(*words: str) -> str:
    """The one line that a mistake costs. In this process, which has paid for the imports already."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 2, done.output + repr(done.exception)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


def test_a_mistake_is_one_line_and_exit_code_2_for_the_shell_too(tmp_path):
    done = prefvec("train", "--config", str(tmp_path / "missing.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: config {tmp_path / 'missing.yaml'}: no such file\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['prefvec', '--help']\n"
        "from prefvec_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("demo", "train", "eval", "search", "serve", "export", "vectors"):
        assert f"  {command} " in done.stdout


CROWD = """
from prefvec_ray.cli import quiet_libraries
quiet_libraries()
from prefvec_ray.common.cluster import connect
connect()
import time, ray
@ray.remote(num_cpus=0)
class Helper:
    def here(self): pass
helpers = [Helper.remote() for _ in range(8 * int(ray.cluster_resources()["CPU"]))]
ray.get([helper.here.remote() for helper in helpers])
time.sleep(2)  # for what Ray says of it
print("all are here")
"""


@pytest.mark.slow
def test_ray_does_not_warn_of_the_helpers_of_training_runs():
    done = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all are here\n"


@pytest.fixture
def job(tmp_path):
    """Writes a training config and returns its path."""

    def write(base: str = "base", data: str = "pairs.jsonl", more: str = "") -> str:
        path = tmp_path / "job.yaml"
        path.write_text(CONFIG.format(base=base, data=data) + more)
        return str(path)

    return write


def test_config_mistakes_are_one_line_before_any_training(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unknown setting 'epochs'" in refused("train", "--config", job(more="epochs: 3\n"))
    assert "no config.json" in refused("train", "--config", job(base=str(tmp_path)))
    assert not (tmp_path / "runs").exists()


def test_data_mistakes_are_one_line_before_any_training(job, tmp_path, demo_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = str(demo_run["folder"] / "base")
    assert "nowhere.jsonl" in refused("train", "--config", job(base, "nowhere.jsonl"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello"}) + "\n")
    assert "bad.jsonl" in refused("train", "--config", job(base, str(bad)))
    rows = demo_run["folder"] / "world" / "preferences.jsonl"
    path = tmp_path / "job.yaml"
    path.write_text(f"name: job\nbase: {base}\npreferences: {{brave: {{data: {rows}}}}}\n")
    assert "brave" in refused("train", "--config", str(path))
    assert not list((tmp_path / "runs").glob("*/dpo"))


def test_a_base_that_does_not_match_a_vector_is_refused_by_name(demo_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(demo_run["folder"] / "base")
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(demo_run["folder"] / "base").save_pretrained(other)
    registry = str(demo_run["folder"] / "registry")
    words = [
        "export",
        "--base",
        str(other),
        "--registry",
        registry,
        "--set",
        "helpful@1=1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert "helpful" in refused(*words)
    assert not (tmp_path / "out").exists()


def test_vectors_list_and_show(demo_run):
    registry = str(demo_run["folder"] / "registry")
    listed = prefvec("vectors", "list", "--registry", registry, "--json")
    assert {version["name"] for version in json.loads(listed.stdout)} == {"helpful", "harmless"}
    assert "helpful@1" in prefvec("vectors", "list", "--registry", registry).stdout
    shown = json.loads(prefvec("vectors", "show", "helpful@production", "--registry", registry).stdout)
    assert shown["version"] == 1
    assert "no vector 'kind'" in refused("vectors", "show", "kind", "--registry", registry)


def test_export_gives_a_model_that_loads(demo_run, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from prefvec_ray.registry import Registry
    from prefvec_ray.vectors import load_vector

    base, registry, out = demo_run["folder"] / "base", demo_run["folder"] / "registry", tmp_path / "merged"
    words = ["export", "--base", str(base), "--registry", str(registry), "--out", str(out)]
    assert prefvec(*words, "--set", "helpful@1=0.5", "--set", "harmless@1=1").returncode == 0
    merged = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    pristine = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    store = Registry.open(registry)
    helpful, harmless = (load_vector(store.fetch(ref)) for ref in ("helpful@1", "harmless@1"))
    for name, weight in pristine.items():
        expected = weight.double() + 0.5 * helpful.dense(name).double() + harmless.dense(name).double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert "already" in refused(*words, "--set", "helpful@1=0.5") or "exists" in refused(
        *words, "--set", "helpful@1=0.5"
    )
    assert "expected REF=ETA" in refused(*words[:-2], "--out", str(tmp_path / "new"), "--set", "helpful@1")


def test_measuring_configs_are_refused_before_anything_is_measured(demo_run, tmp_path):
    """That they work is seen in test_readme.py, which runs the README's own commands."""
    good: dict[str, Any] = {
        "base": str(demo_run["folder"] / "base"),
        "registry": str(demo_run["folder"] / "registry"),
        "vectors": {"helpful": "helpful@1"},
        "prompts": "tiny-world:micro:0:search",
        "scorer": "tiny-world:micro:0",
        "objectives": ["helpful", "harmless"],
        "output": str(tmp_path / "search"),
    }
    path = tmp_path / "search.yaml"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vectors": {"helpful": "helpful@9"}}, "helpful@9"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"scorer": "no_such_module:score"}, "cannot import no_such_module"),
    ]
    for change, message in changes:
        path.write_text(json.dumps({**good, **change}))
        assert message in refused("search", "--config", str(path))
    path.write_text(json.dumps({**good, "objectives": ["kindness"]}))
    assert "'kindness' is not a metric" in refused("search", "--config", str(path))
    assert not (tmp_path / "search" / "trials.jsonl").exists()


def test_the_registry_is_looked_after_from_the_command_line(demo_run, tmp_path):
    registry = str(tmp_path / "registry")
    shutil.copytree(demo_run["folder"] / "registry", registry)
    on = ["--registry", registry]
    assert prefvec("registry", "verify", *on).stdout.splitlines()[-1] == "sound"
    assert (
        "helpful@reviewed -> 1" in prefvec("registry", "alias", *on, "helpful", "reviewed", "1", "--reason", "r").stdout
    )
    assert "nothing was deleted" in prefvec("registry", "gc", *on).stdout
    assert "graph TD" in prefvec("registry", "lineage", *on, "preset:balanced").stdout
    assert json.loads(prefvec("registry", "presets", *on).stdout)[0]["name"] == "balanced"
    assert "production" in refused("registry", "retire", *on, "helpful@1", "--reason", "old")

    bundle, other = str(tmp_path / "bundle"), ["--registry", str(tmp_path / "other")]
    assert prefvec("registry", "export", *on, "--preset", "balanced", "--out", bundle).returncode == 0
    assert "helpful@1 -> helpful@1" in prefvec("registry", "import", *other, bundle).stdout

    blob = max((tmp_path / "registry" / "blobs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1])
    damaged = prefvec("registry", "verify", *on)
    assert damaged.returncode == 1
    assert blob.name in damaged.stdout

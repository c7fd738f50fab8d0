"""The README is true: its commands run as they stand there, in a folder where `runs/demo` is a finished micro demo."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from prefvec_ray.training import TrainingConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def project(demo_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to type the commands in. The configs are the project's, with the micro world for the tiny one."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(demo_run["folder"])
    for name in ("jobs", "serve_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "jobs" / "configs").glob("tiny_*.yaml"):
        text = path.read_text().replace("tiny-world:tiny:", "tiny-world:micro:")
        path.write_text(text.replace("trials: 24", "trials: 6"))
    (example,) = blocks("yaml")
    config = yaml.safe_load(example)
    TrainingConfig.model_validate(config)
    pairs = {"data": str(demo_run["folder"] / "world" / "preferences.jsonl"), "rows": 48}
    config |= {"base": "runs/demo/base", "preferences": {"helpful": pairs}}
    config["resources"] = {"workers": 1}
    del config["deepspeed"]  # its own tests take two workers
    (folder / "my_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    assert words[0] == "prefvec"
    command = [sys.executable, "-m", "prefvec_ray.cli", *words[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_make_targets_are_what_the_readme_says():
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= targets
    for target, does in {"demo": "prefvec demo", "test": "pytest"}.items():
        plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert plan.returncode == 0, plan.stderr
        assert does in plan.stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_commands_run(project):
    words = [words for words in commands() if words[0] == "prefvec" and words[1] != "serve"]
    assert {line[1] for line in words} == {"data", "train", "vectors", "export", "search", "eval"}
    for line in words:
        done = run(line, project)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (project / "runs" / "merged" / "config.json").is_file()
    assert (project / "runs" / "search" / "trials.jsonl").is_file()
    assert (project / "runs" / "eval" / "evaluation.json").is_file()


def test_the_endpoint_answers_the_readmes_client(project):
    (serve,) = [words for words in commands() if words[:2] == ["prefvec", "serve"]]
    log = (project / "serve.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefvec_ray.cli", *serve[1:]],
        cwd=project,
        stdout=log,
        stderr=log,
    )
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            try:
                httpx.get("http://127.0.0.1:8000/v1/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, (project / "serve.txt").read_text()
                time.sleep(1)
        (code,) = blocks("python")
        namespace: dict[str, Any] = {}
        exec(code.replace("client.chat", "answer = client.chat"), namespace)
        assert namespace["answer"].choices[0].message.content
        answer = namespace["client"].chat.completions.create(
            model="tiny@balanced", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert answer.usage.completion_tokens > 0
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
            log.close()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

"""The package as others get it: its public names, its wheel, and one home for each name."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefvec_ray"
PINNED = Path(__file__).parent / "public_api.txt"
PUBLIC = ("evaluation", "preferences", "registry", "robustness", "scorers", "search", "serving", "tiny_world")
PUBLIC += ("training", "vectors")


def public_names() -> list[str]:
    modules = [importlib.import_module(f"prefvec_ray.{name}") for name in PUBLIC]
    return [f"{module.__name__}.{name}" for module in modules for name in sorted(module.__all__)]


def test_the_public_names_are_those_that_are_pinned():
    """Whoever removes or renames one changes `public_api.txt`, and says so in CHANGELOG.md."""
    assert public_names() == PINNED.read_text().splitlines()


def test_every_public_name_is_there():
    for name in public_names():
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is not None


def test_no_class_has_two_homes():
    homes: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(str(path.relative_to(PACKAGE)))
    assert {name: sorted(places) for name, places in homes.items() if len(places) > 1} == {}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built and installed into an empty folder; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files behind
    shutil.copytree(PACKAGE, source / "prefvec_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    install = ["install", "--no-deps", "--no-index", "--find-links", str(folder), "--target", str(folder / "site")]
    for words in (build, [*install, "prefvec-ray"]):
        done = subprocess.run([*pip, *words], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_all_files_of_the_package(installed):
    ours = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(ours) > 200
    missing = [path for path in ours if not (installed / path.relative_to(ROOT)).is_file()]
    assert not missing


@pytest.mark.slow
def test_the_installed_package_runs(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    code = (
        "import prefvec_ray, pathlib\n"
        "from prefvec_ray.serving.http.page import router\n"
        "from prefvec_ray.tiny_world import TinyWorld\n"
        "TinyWorld('micro').write(pathlib.Path('world'))\n"
        "from prefvec_ray.cli import main\n"
        "print(prefvec_ray.__file__)\n"
        "main(['data', 'check', 'helpful=world/preferences.jsonl'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "pairs to train on" in done.stdout

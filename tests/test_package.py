"""The package as others get it: its public names, its wheel, its dependencies, and one home for each name."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefvec_ray"
PINNED = Path(__file__).parent / "public_api.txt"
PUBLIC = (
    "comparison",
    "evaluation",
    "on_policy",
    "preferences",
    "registry",
    "robustness",
    "scorers",
    "search",
    "serving",
    "tiny_world",
    "training",
    "vectors",
)


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


@pytest.mark.parametrize("folder", ["cluster", "serve_configs", "docs"])
def test_import_paths_in_other_files_lead_somewhere(folder):
    """`prefvec_ray.module:name`, as Ray Serve's configs and environment variables write it."""
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".md", ".yaml") and path.is_file()]
    found = {place for path in files for place in re.findall(r"\bprefvec_ray[\w.]*:[a-z_]+\b", path.read_text())}
    assert found
    for place in found:
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), place


def test_no_class_has_two_homes():
    homes: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(str(path.relative_to(PACKAGE)))
    assert {name: sorted(places) for name, places in homes.items() if len(places) > 1} == {}


# Dependencies

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NEEDS = {
    "cli": "",
    "common": "",
    "common/pool.py": "registry",
    "common/scheduling.py": "registry",
    "comparison": "search",
    "demo.py": "all",
    "evaluation": "",
    "evaluation/harness.py": "lm-eval",
    "on_policy": "search",
    "preferences": "",
    "registry": "",
    "registry/actor.py": "registry",
    "registry/running.py": "registry",
    "registry/transport.py": "registry",
    "reports": "report",
    "robustness": "robustness",
    "scorers": "",
    "scorers/train.py": "train",
    "search": "search",
    "serving": "serve",
    "serving/engines/vllm": "vllm",
    "serving/traces.py": "traces",
    "serving/vllm_plugin.py": "vllm",
    "serving/vllm_server.py": "vllm",
    "tiny_world": "",
    "training": "train",
    "vectors": "",
}
"""Folder or file -> the extra that it needs to be imported; "" is the base install. The longest path counts."""


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml names for the base install and these extras."""
    found: set[str] = set()
    for text in PROJECT["dependencies"] + [t for extra in extras for t in PROJECT["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found |= declared(*requirement.extras)
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imported(path: Path, *, inside: bool) -> Iterator[str]:
    """The top-level modules that a file imports; `inside` also within functions. None for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not inside:
            waiting += node.orelse
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


HOMES = packages_distributions()


def third_party(modules: Iterable[str]) -> dict[str, set[str]]:
    """Module -> the distributions that hold it, its own name where it is not installed; ours are left out."""
    folders = ("prefvec_ray", "tests", "benchmarks", "examples", "jobs")
    ours = {"prefvec_ray", "tests"} | {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}
    wanted = set(modules) - set(sys.stdlib_module_names) - ours
    return {name: {canonicalize_name(home) for home in HOMES.get(name, [name])} for name in wanted}


@pytest.mark.parametrize("folder", ["prefvec_ray", "tests", "examples", "jobs"])
def test_every_imported_package_is_declared(folder):
    known = declared(*PROJECT["optional-dependencies"]) | {"torchattacks"}  # which `make env` installs apart
    modules = {name for path in (ROOT / folder).rglob("*.py") for name in imported(path, inside=True)}
    assert {name: homes for name, homes in third_party(modules).items() if not homes & known} == {}


def test_each_part_needs_no_more_than_its_extra():
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        part = max((part for part in NEEDS if f"{place}/".startswith(f"{part}/")), key=len, default="")
        known = declared(*filter(None, [NEEDS.get(part, "")]))
        undeclared = {name for name, homes in third_party(imported(path, inside=False)).items() if not homes & known}
        assert undeclared == set(), f"{place} imports them, and '{NEEDS.get(part, '')}' does not bring them"


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they need without extras, as they are installed here."""
    found: set[str] = set()
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            requirements = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        found.add(name)
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                more = {(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)}
                waiting += more - seen
                seen |= more
    return found


# The wheel


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder of nothing but the base install's dependencies: links to the files of this environment."""
    folder = tmp_path_factory.mktemp("base") / "site"
    folder.mkdir()
    for name in closure(declared()):
        home = distribution(name)
        for top in {file.parts[0] for file in home.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(home.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


BASE_ONLY = """
import sys
from pathlib import Path

import torch
from prefvec_ray.evaluation import Evaluator
from prefvec_ray.preferences import load_preferences
from prefvec_ray.registry import Registry, open_registry
from prefvec_ray.scorers import load_scorer
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.vectors import LiveModel, Steering, checkpoint_state, load_vector, save_vector, vector_from_checkpoints

world = TinyWorld("micro")
base, plus, minus = (new_model(world, build_tokenizer(world), seed) for seed in (0, 1, 2))
save_vector(vector_from_checkpoints(plus, minus, base=base, preference="helpful"), "vector")
vector = load_vector("vector").validate()
Registry.open("registry", create=True).publish_vector("vector", name="helpful")
assert open_registry("registry").list_vectors()
LiveModel(base, {"helpful": vector}).set_coefficients({"helpful": 0.5})
world.write(Path("world"))
for part in ("training", "search", "serving", "robustness", "reports"):
    try:
        __import__(f"prefvec_ray.{part}")
    except ImportError as error:
        print(f"{part}: {error}")
try:
    open_registry("ray:helpful")
except ImportError as error:
    print(f"registry: {error}")
print("absent:", [name for name in ("ray", "trl", "peft", "matplotlib", "optuna") if name not in sys.modules])
"""


@pytest.mark.slow
def test_the_base_install_needs_neither_ray_nor_trl(installed, base_install, tmp_path):
    """`python -S` sees no site-packages: only the wheel, and what the base install brings."""
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{base_install}"}

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = python("-c", BASE_ONLY)
    assert done.returncode == 0, done.stderr
    assert "absent: ['ray', 'trl', 'peft', 'matplotlib', 'optuna']" in done.stdout
    lines = dict(re.findall(r"^(\w+): .* is not installed: pip install '(.*)'$", done.stdout, flags=re.MULTILINE))
    extras = {
        "training": "train",
        "search": "search",
        "serving": "serve",
        "robustness": "robustness",
        "reports": "report",
        "registry": "registry",
    }
    assert lines == {part: f"prefvec-ray[{extra}]" for part, extra in extras.items()}

    done = python("-m", "prefvec_ray.cli", "data", "check", "helpful=world/preferences.jsonl")
    assert done.returncode == 0, done.stderr
    assert "pairs to train on" in done.stdout
    (tmp_path / "config.yaml").write_text("name: x\n")
    for command, extra in (("train", "train"), ("search", "search"), ("serve", "serve")):
        done = python("-m", "prefvec_ray.cli", command, "--config", "config.yaml")
        assert done.returncode == 2, done.stdout + done.stderr
        assert re.fullmatch(rf"error: [\w, ]+ is not installed: pip install 'prefvec-ray\[{extra}\]'\n", done.stderr)

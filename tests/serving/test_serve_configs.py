"""The shipped Serve configs are valid for Serve and for us, and `build_app` makes an application of them."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from prefvec_ray.common.cluster import SERVE_SETTINGS
from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.http.app import build_app

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "serve_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_valid(path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "prefvec_ray.serving.http.app:build_app"
    config = parse_config(application.args, ServingConfig, source=path.name)
    assert config.ranges["harmless"].min >= 0, "nobody turns harmlessness below the base model's"


def listening() -> list[tuple[str, dict[str, Any]]]:
    """Every serving file of the project: its name and what is given to Serve."""
    found = [(path.name, yaml.safe_load(path.read_text())) for path in CONFIGS]
    for path in sorted((ROOT / "cluster").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and "serveConfigV2" in document.get("spec", {}):
                found.append((path.name, yaml.safe_load(document["spec"]["serveConfigV2"])))
    return found


@pytest.mark.parametrize(("name", "content"), listening(), ids=[name for name, _ in listening()])
def test_whatever_listens_beyond_this_machine_has_floors_and_asks_for_keys(name, content):
    (application,) = content["applications"]
    config = parse_config(application["args"], ServingConfig, source=name)
    assert config.floors, "a range bounds what callers ask for, a floor what anybody gets"
    assert config.vectors
    if content["http_options"]["host"] not in ("127.0.0.1", "localhost", "::1"):
        assert config.keys
        assert not config.anonymous.allowed
        assert config.audit


def test_the_file_for_kubernetes_is_among_them():
    assert "rayservice.yaml" in [name for name, _ in listening()]


@pytest.mark.parametrize("file", ["cluster/kuberay/rayservice.yaml", "cluster/on-premises.yaml", "cluster/Dockerfile"])
def test_clusters_begin_with_what_serve_reads_as_it_starts(file):
    text = (ROOT / file).read_text()
    for name, value in SERVE_SETTINGS.items():
        between = r'(=|, value: "|\n *value: )'
        assert re.search(name + between + re.escape(value), text), name


def test_its_args_build_an_application(base_folder, registry_root):
    (application,) = yaml.safe_load(CONFIGS[0].read_text())["applications"]
    args = application["args"] | {"base": str(base_folder), "registry": registry_root}
    args["vectors"] = {"helpful": "helpful@1", "harmless": "harmless@1"}
    assert isinstance(build_app(args), serve.Application)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_told_before_anything_is_deployed(base_folder, registry_root):
    args = {"model": "tiny", "base": str(base_folder), "registry": registry_root, "engine": {"kind": "vllm"}}
    with pytest.raises(InputError, match="vLLM is not installed here"):
        build_app(args)


def test_wrong_args_are_one_clear_line():
    with pytest.raises(InputError, match="unknown setting 'vektors'") as caught:
        build_app({"model": "tiny", "base": "b", "registry": "r", "vektors": {}})
    assert "\n" not in str(caught.value)

"""The shipped Serve configs are valid for Serve and for us, and `build_app` makes an application of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from prefvec_ray.config import parse_config
from prefvec_ray.errors import InputError
from prefvec_ray.serving.app import build_app
from prefvec_ray.serving.config import ServingConfig

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_valid(path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "prefvec_ray.serving.app:build_app"
    config = parse_config(application.args, ServingConfig, source=path.name)
    assert config.ranges["harmless"].min >= 0, "nobody turns harmlessness below the base model's"


def test_its_args_build_an_application(base_folder, registry_root):
    (application,) = yaml.safe_load(CONFIGS[0].read_text())["applications"]
    args = application["args"] | {"base": str(base_folder), "registry": registry_root, "vectors": None}
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

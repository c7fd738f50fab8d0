"""The cluster files are what the tools that read them take."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_ray_up_takes_the_file(path):
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        validate_config(prepare_config({**config, "max_worker": 3}))

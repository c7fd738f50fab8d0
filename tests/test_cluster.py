"""Every cluster file is what the tool that reads it takes, and all of them agree with the project's pins and paths."""

import re
import shlex
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from prefvec_ray.common.config import parse_config
from prefvec_ray.serving.config import ServingConfig

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
IN_IMAGE = "/home/ray/prefvec-ray"
RAY_UP = sorted(CLUSTER.glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def by_name(path: Path) -> str:
    return path.name


# ray up


@pytest.mark.parametrize("path", RAY_UP, ids=by_name)
def test_ray_up_takes_the_file(path):
    config = yaml.safe_load(path.read_text())
    for node_type in config.get("available_node_types", {}).values():
        node_type["resources"] = node_type["resources"] or {"CPU": 1}  # empty: `ray up` fills it in by asking EC2
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        validate_config(prepare_config({**config, "max_worker": 3}))


@pytest.mark.slow
def test_ray_up_launches_every_machine_of_the_aws_file(tmp_path, monkeypatch):
    """Through Ray's own AWS provider and botocore's checks of every field, against a local stand-in for EC2 and IAM."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # where `ray up` leaves its ssh key
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    config = prepare_config(yaml.safe_load((CLUSTER / "aws.yaml").read_text()))
    region = config["provider"]["region"]
    with ExitStack() as ends:
        mocked = moto.mock_aws()
        mocked.start(reset=False)  # the buckets of the suite's S3 server are in this process, too
        ends.callback(mocked.stop, remove_data=False)
        image = boto3.client("ec2", region).describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for node_type in config["available_node_types"].values():
            node_type["node_config"]["ImageId"] = image
        iam = boto3.client("iam", region)  # as `ray up` leaves it after its first time
        iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")

        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        validate_config(config)
        gpus = {name: kind["resources"].get("GPU", 0) for name, kind in config["available_node_types"].items()}
        assert gpus == {"head": 0, "gpu-80gb": 8, "gpu-48gb": 4}
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            (machine,) = provider.create_node(kind["node_config"], {"ray-node-name": name}, 1).values()
            machine.reload()
            assert machine.instance_type == kind["node_config"]["InstanceType"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_cloud_cluster_reaches_the_shared_folder_and_the_registry(name):
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    options = [shlex.split(option) for option in config["docker"]["run_options"]]
    environment = dict(value.split("=", 1) for flag, value in options if flag == "--env")
    assert ["--volume", "/shared:/shared"] in options
    assert environment["PREFVEC_SHARED"] == "/shared"
    assert environment["PREFVEC_REGISTRY"].startswith(("s3://", "gs://"))
    assert any("mount -t nfs" in command for command in config["initialization_commands"])


# KubeRay: the fields of its API reference (ray.io/v1, KubeRay 1.6) that the files use; any other is a typo


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?$")  # KubeRay appends to it; Kubernetes ends at 63


class Head(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class Workers(Head):
    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815


class Autoscaler(Strict):
    idleTimeoutSeconds: int = 60  # noqa: N815
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"  # noqa: N815


class Authentication(Strict):
    mode: Literal["token", "disabled"]


class Cluster(Strict):
    rayVersion: str  # noqa: N815
    authOptions: Authentication  # noqa: N815
    headGroupSpec: Head  # noqa: N815
    workerGroupSpecs: list[Workers]  # noqa: N815
    enableInTreeAutoscaling: bool = False  # noqa: N815
    autoscalerOptions: Autoscaler | None = None  # noqa: N815


class GenerationRequest(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]  # noqa: N815
    backoffLimit: int  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: int  # noqa: N815
    rayClusterSpec: Cluster  # noqa: N815


class Service(Strict):
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: Cluster  # noqa: N815


class Resource(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    metadata: Metadata


class RayCluster(Resource):
    kind: Literal["RayCluster"]
    spec: Cluster


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: GenerationRequest


class RayService(Resource):
    kind: Literal["RayService"]
    spec: Service


KINDS: dict[str, Any] = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def custom_resource(path: Path) -> Any:
    (document,) = (document for document in documents(path) if document["kind"] in KINDS)
    return KINDS[document["kind"]].model_validate(document).spec


def cluster_of(spec: Any) -> Cluster:
    return getattr(spec, "rayClusterSpec", None) or getattr(spec, "rayClusterConfig", None) or spec


def groups(path: Path) -> list[Head]:
    cluster = cluster_of(custom_resource(path))
    return [cluster.headGroupSpec, *cluster.workerGroupSpecs]


@pytest.mark.parametrize("path", KUBERAY, ids=by_name)
def test_kuberay_takes_the_file(path):
    cluster = cluster_of(custom_resource(path))
    assert cluster.authOptions.mode == "token"
    for group in cluster.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
        assert cluster.enableInTreeAutoscaling or group.minReplicas == group.maxReplicas


@pytest.mark.parametrize("path", KUBERAY, ids=by_name)
def test_kubernetes_takes_its_pods(path):
    client = pytest.importorskip("kubernetes.client")
    for group in groups(path):
        client.V1PodTemplateSpec.model_validate(group.template)
        with pytest.raises(ValueError, match="volumeMount"):
            client.V1Container.model_validate({**group.template["spec"]["containers"][0], "volumeMount": []})
    for document in documents(path):
        if document["kind"] == "PersistentVolumeClaim":
            client.V1PersistentVolumeClaim.model_validate(document)


@pytest.mark.parametrize("path", KUBERAY, ids=by_name)
def test_every_pod_has_the_image_the_shared_folder_and_no_secret_of_its_own(path):
    user = re.search(r"^USER (\d+):", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    claims = [d["metadata"]["name"] for d in documents(CLUSTER / "kuberay" / "raycluster.yaml") if "Claim" in d["kind"]]
    for group in groups(path):
        pod = group.template["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] in claims
        assert container["image"].endswith(f"/prefvec-ray:{PROJECT['version']}")
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts what is guaranteed"
        assert user is not None
        assert pod["securityContext"]["runAsUser"] == int(user[1])
        for variable in container["env"]:
            assert not re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]), "secrets come from envFrom"


def test_the_service_serves_what_prefvec_ray_takes():
    spec = custom_resource(CLUSTER / "kuberay" / "rayservice.yaml")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(spec.serveConfigV2)).applications
    assert application.import_path == "prefvec_ray.serving.http.app:build_app"
    config = parse_config(application.args, ServingConfig, source="rayservice.yaml")
    assert config.ranges["harmless"].min >= 0, "nobody turns harmlessness below the base model's"
    (group,) = spec.rayClusterConfig.workerGroupSpecs
    limits = group.template["spec"]["containers"][0]["resources"]["limits"]
    assert config.replicas.gpus <= int(limits["nvidia.com/gpu"])
    assert config.replicas.cpus <= int(limits["cpu"])
    assert config.replicas.max <= group.maxReplicas


# Versions and paths


def test_versions_are_the_projects_pins():
    for path in KUBERAY:
        assert cluster_of(custom_resource(path)).rayVersion == PINS["ray"]
    for path in (CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"):
        assert yaml.safe_load(path.read_text())["docker"]["image"].endswith(f"/prefvec-ray:{PROJECT['version']}")
    on_premises = "\n".join(yaml.safe_load((CLUSTER / "on-premises.yaml").read_text())["setup_commands"])
    assert on_premises.count("pip install") == on_premises.count("-c constraints.txt")


@pytest.mark.parametrize("path", [*RAY_UP, *KUBERAY], ids=by_name)
def test_commands_name_files_that_exist(path):
    text = path.read_text().replace("prefvec-ray/", "")
    named = set(re.findall(r"(?:jobs|cluster|docs|prefvec_ray)/[\w./-]*\.(?:py|yaml|md)", text))
    assert named, "a cluster file says how it is used"
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_unprivileged_and_complete():
    steps = dockerfile()
    known = {"ARG", "FROM", "SHELL", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert {step for step, _ in steps} <= known
    assert ("WORKDIR", IN_IMAGE) in steps
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dict(steps)["USER"]), "a number that is not root's"
    assert dict(steps)["ARG"] == "TORCH_INDEX=https://pypi.org/simple"
    base = next(value for step, value in steps if step == "ARG")
    assert base.startswith("BASE=python:3.11"), "the Python of the pins"
    installs = [value for step, value in steps if step == "RUN" and "pip install" in value]
    assert all("-c constraints.txt" in value for value in installs)
    assert any("deepspeed" in value for value in installs)
    assert {"deepspeed", "boto3", "torch"} <= set(PINS)
    copied = [source for step, value in steps if step == "COPY" for source in value.split()[:-1]]
    taken = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in taken, f"{source} is not sent to the builder"

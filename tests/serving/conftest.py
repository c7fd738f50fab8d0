"""One running endpoint of the tiny model of `tests/generation`, for all tests that talk HTTP."""

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from prefvec_ray.common.cluster import PROXY_MIDDLEWARE, PROXY_SETTING
from prefvec_ray.registry import Registry
from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.access.keys import add_key
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.replica import Replica
from prefvec_ray.vectors import (
    load_vector,
    save_vector,
)
from tests.generation.conftest import base_folder, merged_alone, tokenizer, vector_folders, vectors  # noqa: F401

os.environ["PREFVEC_REFUSALS_PER_SECOND"] = "1000"  # tests are refused by the thousand
os.environ[PROXY_SETTING] = PROXY_MIDDLEWARE  # before any test starts a cluster: Serve's proxy inherits it


@pytest.fixture(scope="session")
def make_replica() -> Callable[[ServingConfig, Release], Replica]:
    """Replicas without Serve, which awaits their constructor."""

    def make(config: ServingConfig, release: Release) -> Replica:
        replica = Replica.__new__(Replica)
        asyncio.run(replica.__init__(config, release))  # type: ignore[misc]
        return replica

    return make


@pytest.fixture(scope="session")
def registry_root(
    vector_folders: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A registry with both vectors, a run's delta, a preset to serve and one below a floor of 0."""
    root = tmp_path_factory.mktemp("registry")
    registry = Registry.open(root)
    for folder in vector_folders.values():
        registry.publish_vector(folder, metrics={"gain": 0.2})
    delta = load_vector(vector_folders["helpful"]).replace(preference="helpful+")
    registry.publish_vector(save_vector(delta, root.parent / "delta"))
    registry.publish_preset(
        "cautious", {"helpful@1": 0.25, "harmless@1": 0.75}, metrics={"harm": 0.8}, reason="the front's knee"
    )
    registry.publish_preset("reckless", {"harmless@1": -0.5}, reason="what no caller may get")
    return str(root)


@dataclass
class Endpoint:
    """`client` has no key. `key` makes one that the running endpoint takes."""

    url: str
    client: OpenAI
    registry: Registry
    keys: Path
    audit: Path

    def post(self, content: Any, path: str = "/chat/completions", **settings: Any) -> httpx.Response:
        body = content if isinstance(content, str | bytes) else json.dumps(content)
        headers = {"content-type": "application/json"} | settings
        return httpx.post(self.url + path, content=body, headers=headers, timeout=60)

    def status(self) -> dict[str, Any]:
        (status,) = httpx.get(self.url.removesuffix("/v1") + "/healthz").json()["replicas"]
        return status

    def key(self, name: str, **settings: Any) -> str:
        return add_key(self.keys, name, **settings)[1]

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models", timeout=30).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="session")
def running() -> Iterator[list[Endpoint]]:
    """The endpoint that runs, if any; what tests leave running is stopped at the end."""
    endpoints: list[Endpoint] = []
    yield endpoints
    if endpoints:
        endpoints[-1].client.close()
        stop()


@pytest.fixture(scope="module")
def endpoint(ray_cluster, running, base_folder, registry_root, tmp_path_factory) -> Endpoint:  # noqa: F811
    """Deployed by the first file that needs it, and again where a file has taken it down. Harmless has a floor of 0;
    callers without a key may ask for anything above, and `endpoint.key(...)` makes keys with other bounds."""
    if running and running[-1].answers():
        return running[-1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("door")
    keys, audit = folder / "keys.yaml", folder / "audit.jsonl"
    add_key(keys, "nobody")
    config = ServingConfig.model_validate(
        {
            "model": "tiny",
            "base": base_folder,
            "registry": registry_root,
            "vectors": {"harmless": "harmless@1", "helpful": "helpful@1"},
            "ranges": {"harmless": {"min": 0}},
            "floors": {"harmless": 0},
            "keys": keys,
            "audit": {"file": audit},
            "engine": {"max_new_tokens": 400, "max_batch": 8},
            "replicas": {"cpus": 0.5},
            "limits": {"answers": 20, "body_bytes": 50_000, "body_seconds": 2, "queued_requests": 32},
        }
    )
    url = start(config, port=port)
    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    running.append(Endpoint(url, client, Registry.open(registry_root), keys, audit))
    return running[-1]

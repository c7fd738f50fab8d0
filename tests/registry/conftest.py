"""Tiny real vectors, and every kind of root: a folder, and a bucket behind a real S3 server on loopback."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prefvec_ray.registry import Registry
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.vectors import save_vector, vector_from_state

BASE = "blake3:" + "b" * 64


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """`host:port` of an S3 server with a bucket `vectors`."""
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    client = fs.S3FileSystem(
        access_key="key",
        secret_key="hush-hush",
        scheme="http",
        region="us-east-1",
        endpoint_override=f"{host}:{port}",
        allow_bucket_creation=True,
    )
    client.create_dir("vectors")
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket_root(s3_server: str, tmp_path: Path) -> str:
    query = f"scheme=http&region=us-east-1&endpoint_override={s3_server}"
    return f"s3://key:hush-hush@vectors/{tmp_path.name}/store?{query}"


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a registry may live; a test that takes this runs on each kind."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket_root")


@pytest.fixture
def open_registry(tmp_path: Path) -> Callable[..., Registry]:
    """Open a root with a cache of its own and a quick lease."""

    def open_(root: str | Path, cache: str = "cache", **options: object) -> Registry:
        return Registry.open(root, cache=NodeCache(tmp_path / cache), ttl_s=5.0, settle_s=0.1, **options)  # type: ignore[arg-type]

    return open_


@pytest.fixture
def registry(root: str, open_registry: Callable[..., Registry]) -> Registry:
    return open_registry(root)


@pytest.fixture
def make_vector(tmp_path: Path) -> Callable[..., Path]:
    """A vector folder; another `seed` makes other numbers."""
    made = 0

    def make(
        preference: str = "helpful",
        seed: int = 0,
        size: int = 16,
        base: str = BASE,
        max_shard_size: int | str = "5GB",
        **info: object,
    ) -> Path:
        nonlocal made
        made += 1
        generator = torch.Generator().manual_seed(seed)
        delta = {
            "layer.weight": torch.randn(size, size, generator=generator),
            "layer.bias": torch.randn(size, generator=generator),
        }
        vector = vector_from_state(delta, preference=preference, base_fingerprint=base, **info)  # type: ignore[arg-type]
        return save_vector(vector, tmp_path / f"vector-{made}", max_shard_size=max_shard_size)

    return make

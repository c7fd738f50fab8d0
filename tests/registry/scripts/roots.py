"""Where the kill scripts put their registries: folders, or buckets of an S3 server in this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prefvec_ray.vectors import save_vector, vector_from_state


@contextmanager
def roots(folder: Path, names: tuple[str, ...], where: str) -> Iterator[dict[str, str]]:
    """Name -> root of a registry. `where` is `folder` or `bucket`."""
    if where == "folder":
        yield {name: str(folder / name) for name in names}
        return
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"scheme=http&region=us-east-1&endpoint_override={host}:{port}"
    bucket, _ = fs.FileSystem.from_uri(f"s3://key:secret@vectors/?{query}&allow_bucket_creation=true")
    bucket.create_dir("vectors")
    yield {name: f"s3://key:secret@vectors/{name}?{query}" for name in names}
    server.stop()


def tiny_vector(folder: Path, seed: int) -> Path:
    """A vector of eight numbers."""
    delta = {"w": torch.randn(8, generator=torch.Generator().manual_seed(seed))}
    vector = vector_from_state(delta, preference="tiny", base_fingerprint="blake3:" + "0" * 64)
    return save_vector(vector, folder)

"""Publishing follows no link out of a vector's folder."""

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.vectors import save_vector, vector_from_state


def test_a_link_to_another_file_is_not_published(tmp_path):
    vector = vector_from_state({"w": torch.ones(2, 2)}, base_fingerprint="blake3:" + "b" * 64, preference="helpful")
    folder = save_vector(vector, tmp_path / "vector")
    (tmp_path / "secret.txt").write_text("not for others")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    registry = Registry.open(tmp_path / "registry")
    with pytest.raises(InputError, match="is a link to outside its folder"):
        registry.publish_vector(folder)
    assert registry.list_vectors() == []
    (folder / "notes.txt").unlink()
    assert registry.publish_vector(folder).version == 1

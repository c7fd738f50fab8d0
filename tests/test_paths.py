"""A node that does not see a folder: one line that names both, at once, whatever the work is."""

import os

import pytest

from prefvec_ray.common.errors import JobError
from prefvec_ray.common.paths import check_visible, this_node


def test_what_is_not_there_or_is_an_unmounted_folder_is_named_with_its_node(tmp_path):
    (tmp_path / "mount").mkdir()
    (tmp_path / "file").touch()
    check_visible(tmp_path, tmp_path / "file")
    assert os.uname().nodename in this_node()
    for path in (tmp_path / "mount", tmp_path / "mount" / "base", tmp_path / "file" / "base"):
        with pytest.raises(JobError) as raised:
            check_visible(tmp_path, path)
        assert str(raised.value) == f"node {this_node()} does not see {path}: is the storage mounted there?"

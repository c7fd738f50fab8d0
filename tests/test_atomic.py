"""Files and folders that appear whole or not at all."""

import errno
import fcntl
from contextlib import suppress
from pathlib import Path

import pytest

from prefvec_ray.common.atomic import new_file, new_folder, write_whole
from prefvec_ray.common.errors import InputError


def test_a_file_appears_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with new_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_fails_leaves_nothing_behind(tmp_path: Path, durable: bool) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with suppress(RuntimeError), new_file(target, durable=durable) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_secret_file_is_never_readable_by_others(tmp_path: Path) -> None:
    with new_file(tmp_path / "keys", mode=0o600) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
        temporary.write_text("secret")
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


def test_text_is_written_whole_and_in_utf8(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "ä")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4"


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with suppress(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_where_that_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with new_folder(out, replaces=lambda folder: (folder / "ours").exists()) as folder:
            (folder / "ours").write_text(text)
    assert (out / "ours").read_text() == "new"
    with pytest.raises(InputError, match="already exists"), new_folder(out):
        pass
    with pytest.raises(InputError, match="is not replaced"), new_folder(out, replaces=lambda folder: False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_written_to_and_nothing_of_others_is_removed(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock on a folder. Then nobody knows whether the other's writer lives."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial-of-another").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-of-another", "out"]

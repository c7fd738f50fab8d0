"""Foreign JSON and YAML: every fault is one line that names the file."""

import errno
import os

import pytest
from pydantic import BaseModel

from prefvec_ray.common.config import Config, load_config, parse_config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import DEPTH, os_failure, parse_models, read_json, read_model


class Settings(Config):
    name: str
    sizes: dict[str, int] = {}


class Line(BaseModel):
    step: int


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper|not JSON"),
        (b'{"a": ' + b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1) + b"}", "nested deeper"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"name": "x"}', "step"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path, content, words):
    file = tmp_path / "record.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        read_model(file, Line)
    assert str(error.value).startswith(str(file))


def test_a_file_that_is_none_or_too_large(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="a folder"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="no such file"):  # and nobody waits for a writer
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_json(tmp_path / "large.json")


def test_a_damaged_line_is_named_by_its_number():
    with pytest.raises(InputError, match=r"trials\.jsonl, line 2: step"):
        list(parse_models([b'{"step": 1}\n', b'{"step": "x"}\n'], Line, "trials.jsonl", "delete it"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a mapping"),
        ("name: a\nname: b\n", "line 2: 'name' is set twice"),
        ("name: !!int foo", "does not fit its type"),
        ("name: 2001-99-99", "does not fit its type"),
        ("name: &a [*a]", "alias inside itself"),
        ("[" * 5000, "nested deeper"),
        ("name: " + "9" * 5000, "does not fit its type"),
        ("name: 0x" + "f" * 9000, "an integer of more than"),
        ("name: !!python/object:os.system x", "not readable as YAML"),
        ("name: a\nsizes: null\n", "sizes"),
        ("name: ['s3://key:sec/ret@bucket']", r"s3://bucket"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, text, words):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load_config(tmp_path / "job.yaml", Settings)
    assert "sec/ret" not in str(error.value)


def test_aliases_that_stand_for_a_billion_values_are_refused(tmp_path):
    lines = ["k0: &k0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="through its aliases"):
        load_config(tmp_path / "job.yaml", Settings)


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "job.yaml").write_text("name: a\nsizes: {<<: {a: 1, b: 2}, a: 3}\n")
    assert load_config(tmp_path / "job.yaml", Settings).sizes == {"a": 3, "b": 2}


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(InputError) as error:
        parse_config({"name": ["x" * 100_000]}, Settings, source="job")
    assert len(str(error.value)) < 500


def test_only_faults_of_the_machine_become_a_line():
    assert isinstance(os_failure(OSError(errno.ENOSPC, "No space left on device", "runs/x")), JobError)
    assert isinstance(os_failure(OSError(errno.EACCES, "Permission denied", "runs/x")), InputError)
    assert isinstance(os_failure(OSError(errno.EROFS, "Read-only file system", "runs/x")), InputError)
    assert os_failure(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert os_failure(OSError("a bug")) is None

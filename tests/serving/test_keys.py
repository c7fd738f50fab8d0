"""API keys: made by the command, hashed in the file, taken up and refused without a restart."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.access.keys import Keys, KeysUnreadableError, add_key, parse_range, read_keys, revoke_key
from prefvec_ray.serving.config import Range


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def anything_goes(key: object) -> None:
    pass


def run(*words: str | Path) -> tuple[int, str]:
    """Exit code and standard output of `prefvec keys ...`."""
    done = CliRunner().invoke(main, ["keys", *map(str, words)])
    return done.exit_code, done.stdout


def test_the_command_shows_a_key_once_and_the_file_keeps_its_digest(path):
    code, secret = run(
        "add", "--file", path, "--name", "team-a", "--range", "harmless=0.5..1:0.7", "--presets-only",
        "--preset", "cautious", "--tokens-per-day", "1000",
    )  # fmt: skip
    secret = secret.strip()
    assert code == 0
    assert len(secret) == len("pv-") + 43, "256 bits in base64"
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    (key,) = read_keys(path)
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert (key.coefficients, key.presets, key.tokens_per_day) == ("presets", ("cautious",), 1000)
    assert key.ranges == {"harmless": Range(min=0.5, max=1, default=0.7)}
    assert not key.may_go_below_floor
    listed = run("list", "--file", path)[1]
    assert key.id in listed
    assert key.sha256[:8] not in listed
    assert run("revoke", "--file", path, key.id)[0] == 0
    assert read_keys(path)[0].revoked is not None
    assert run("revoke", "--file", path, key.id)[0] == 2, "said once more, it is a mistake"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("harmless", "expected NAME=MIN..MAX"),
        ("harmless=1", "expected NAME=MIN..MAX"),
        ("harmless=0.5..1", "a range without 0 needs a default"),
        ("harmless=nan..1", "finite"),
        ("harmless=1..-1:0", "min <= default <= max"),
    ],
)
def test_a_range_that_makes_no_sense_is_one_clear_line(text, says):
    with pytest.raises(InputError, match=says):
        parse_range(text)


def test_the_file_is_read_again_when_it_changes(path):
    _, first = add_key(path, "first")
    keys = Keys(path, anything_goes)
    found = keys.find(first)
    assert found is not None
    assert found.name == "first"
    assert keys.find("pv-guess") is None
    added, second = add_key(path, "second")
    found = keys.find(second)
    assert found is not None
    assert found.id == added.id
    revoke_key(path, added.id)
    kept, revoked = keys.find(first), keys.find(second)
    assert kept is not None
    assert kept.revoked is None
    assert revoked is not None
    assert revoked.revoked is not None


@pytest.mark.parametrize("spoil", ["keys: [", "keys: [{id: x}]", None])
def test_a_file_that_cannot_be_read_any_more_accepts_nobody_until_it_is_mended(path, spoil):
    _, secret = add_key(path, "first")
    sound = path.read_text()
    keys = Keys(path, anything_goes)
    path.unlink()
    if spoil is not None:
        path.write_text(spoil)
    for _ in range(2):
        with pytest.raises(KeysUnreadableError):
            keys.find(secret)
    path.write_text(sound)
    found = keys.find(secret)
    assert found is not None
    assert found.name == "first"


def test_a_file_that_others_may_write_is_refused(path):
    add_key(path, "first")
    path.chmod(0o660)
    with pytest.raises(InputError, match="chmod 600"):
        Keys(path, anything_goes)


@pytest.mark.parametrize("twice", ["id", "sha256"])
def test_two_keys_with_one_identity_are_refused(path, twice):
    add_key(path, "first")
    add_key(path, "second")
    content = yaml.safe_load(path.read_text())
    content["keys"][1][twice] = content["keys"][0][twice]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"same {twice}"):
        read_keys(path)


def test_keys_made_at_once_are_all_kept(path):
    with ThreadPoolExecutor(4) as pool:
        made = [key.id for key, _ in pool.map(lambda i: add_key(path, f"team-{i}"), range(8))]
    assert sorted(key.id for key in read_keys(path)) == sorted(made)
    assert {file.name for file in path.parent.iterdir()} == {"keys.yaml", "keys.yaml.lock"}, "nothing temporary is left"

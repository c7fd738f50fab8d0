"""Preferences have one spelling, everywhere."""

import json

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import check_preference, skeleton
from prefvec_ray.vectors import load_vector, save_vector, vector_from_state

WRONG = [
    "harmless ",
    " harmless",
    "harm\u200bless",
    "ｈarmless",
    "hаrmless",
    "harmless\n",
    "",
    "+",
    "a" * 65,
    "a/b",
    "a++",
]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_name_is_refused_in_one_ascii_line(name):
    with pytest.raises(InputError, match="expected 1 to 64 ASCII letters") as caught:
        check_preference(name)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["harmless", "harmless+", "harmless-", "a", "v1.2_b-c", "a" * 64])
def test_names_and_runs_of_them_are_taken(name):
    assert check_preference(name) == name


def test_no_vector_is_made_or_read_under_another_name(tmp_path):
    state = {"w": torch.ones(2, 2)}
    with pytest.raises(InputError, match="expected 1 to 64 ASCII letters"):
        vector_from_state(state, base_fingerprint="blake3:" + "0" * 64, preference="harmless ")
    folder = save_vector(
        vector_from_state(state, base_fingerprint="blake3:" + "0" * 64, preference="harmless"), tmp_path / "v"
    )
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["preference"] = "harm\u200bless"
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
    with pytest.raises(InputError, match="metadata cannot be read"):
        load_vector(folder)


def test_look_alikes_have_one_skeleton():
    assert (
        len({skeleton(name) for name in ("harmless", "HARMLESS", "harm1ess", "harmIess", "harm-less", "harmle55")}) == 1
    )
    assert skeleton("helpful") != skeleton("harmless")

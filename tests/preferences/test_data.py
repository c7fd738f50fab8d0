import gzip
import json
import resource
from pathlib import Path

import pytest
from datasets import Dataset

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.preferences import data_digest, flip, load_preferences
from prefvec_ray.tiny_world import TinyWorld

REAL = Path(__file__).parents[3] / "shared" / "data" / "preference"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data files are not here")

TRL = {"prompt": "How?", "chosen": "Like this.", "rejected": "No."}
PKU = {
    "prompt": "How?",
    "response_0": "Like this.",
    "response_1": "No.",
    "better_response_id": 0,
    "safer_response_id": 1,
}
HEAD = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant: "
HH = {"chosen": HEAD + "Like this.", "rejected": HEAD + "No."}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pku_label_orders_the_pair(tmp_path):
    path = write(tmp_path / "rows.jsonl", PKU)
    helpful, harmless = (load_preferences(path, preference=name) for name in ("helpful", "harmless"))
    assert helpful.format == "pku-saferlhf"
    assert helpful.dataset[0] == {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "Like this."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert harmless.dataset[0] == flip(helpful.dataset)[0]
    assert helpful.digest != harmless.digest


def test_hh_transcripts_split_at_the_last_answer(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HH).encode()))
    loaded = load_preferences(path)
    assert loaded.format == "hh-rlhf"
    assert loaded.dataset[0]["prompt"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How?"},
    ]
    assert loaded.dataset[0]["rejected"] == [{"role": "assistant", "content": "No."}]


def test_trl_plain_and_conversational_and_a_json_list(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([TRL, TRL | {"prompt": "Why?"}]))
    plain = load_preferences(tmp_path / "rows.json")
    assert (plain.format, len(plain.dataset), plain.dataset[0]) == ("trl", 2, TRL)
    conversational = load_preferences(load_preferences(write(tmp_path / "a.jsonl", HH)).dataset.to_list())
    assert conversational.format == "trl"
    assert conversational.dataset[0]["chosen"] == [{"role": "assistant", "content": "Like this."}]


def test_flaws_of_the_published_data_are_dropped_and_counted(tmp_path):
    same = HH | {"rejected": HH["chosen"]}
    other = HH | {"rejected": HH["rejected"].replace("Hi", "Hey")}
    empty = HH | {"rejected": HEAD}
    loaded = load_preferences(write(tmp_path / "rows.jsonl", same, HH, other, empty, same))
    assert len(loaded.dataset) == 1
    assert loaded.notes == (
        "2 pairs dropped: the two answers are identical",
        "1 pairs dropped: the two transcripts differ before the last answer",
        "1 pairs dropped: an answer is empty",
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([TRL, {"prompt": "How?", "chosen": "a"}], ["row 2", "'rejected'", "missing"]),
        ([TRL, {"chosen": "a", "rejected": "b"}], ["row 2", "'prompt'", "missing"]),
        ([TRL | {"prompt": 3}], ["row 1", "'prompt'", "3"]),
        ([TRL | {"chosen": "  "}], ["nothing to train on", "1 pairs dropped: an answer is empty"]),
        ([TRL | {"prompt": ""}], ["nothing to train on", "1 pairs dropped: the prompt is empty"]),
        ([TRL | {"prompt": "a\0b"}], ["row 1", "NUL"]),
        ([TRL | {"prompt": "a\ud800b"}], ["row 1", "'prompt'", "Unicode"]),
        ([TRL | {"chosen": 3}], ["row 1", "'chosen'", "3"]),
        ([TRL | {"chosen": TRL["rejected"]}], ["nothing to train on", "1 pairs dropped"]),
        ([TRL, ["a"]], ["row 2", "list"]),
        ([{"question": "How?"}], ["question", "trl", "pku-saferlhf", "hh-rlhf"]),
        ([HH | {"chosen": "Like this."}], ["row 1", "'chosen'", "transcript"]),
        ([HH | {"chosen": HEAD + "Like this.\n\nHuman: Thanks"}], ["row 1", "'chosen'", "transcript"]),
        ([TRL | {"prompt": [{"role": "user", "content": "How?"}]}], ["row 1", "'chosen'", "list of messages"]),
        ([TRL, load_preferences([HH]).dataset[0]], ["mixed"]),
        ([], ["no rows"]),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, rows, words):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError) as error:
        load_preferences(path)
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [2, "0", None, True])
def test_pku_label_must_be_0_or_1(tmp_path, label):
    with pytest.raises(InputError, match="row 1: field 'safer_response_id'"):
        load_preferences([PKU | {"safer_response_id": label}], preference="harmless")


def test_pku_needs_to_know_which_label():
    with pytest.raises(InputError, match="helpful and harmless, not for 'polite'"):
        load_preferences([PKU], preference="polite")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"prompt": \n', "line 1: not JSON"),
        ("rows.json", b"{}", "expected a JSON list"),
        ("rows.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("rows.json", b"", "no rows"),
        ("rows.jsonl", b"\xff\xfe", "UTF-8"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(json.dumps(TRL).encode(), mtime=0)[:-9], "cannot be read"),
        ("pytorch_model.bin", b"", "cannot read this kind of file"),
        ("rows.pt", b"", "cannot read this kind of file"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_preferences(tmp_path / name)
    assert name in str(error.value)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_preferences(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="unknown preference format 'parquet'"):
        load_preferences([TRL], format="parquet")
    with pytest.raises(InputError, match="rows=0"):
        load_preferences([TRL], rows=0)
    assert len(load_preferences([TRL, TRL | {"prompt": "Why?"}], rows=1).dataset) == 1


def test_pairs_that_find_no_room_fail_in_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # no file may grow beyond 1 MiB: as on a full disk
    try:
        with pytest.raises(JobError, match=r"cannot write the pairs to .*; make room, or set TMPDIR"):
            load_preferences([TRL | {"prompt": "x" * 4_000_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_flip_swaps_every_pair_of_columns_and_undoes_itself():
    pairs = Dataset.from_list([TRL | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}])
    flipped = flip(pairs)
    assert flipped[0] == {
        "prompt": "How?",
        "chosen": "No.",
        "rejected": "Like this.",
        "ref_chosen_logps": -2.0,
        "ref_rejected_logps": -1.0,
    }
    assert flip(flipped)[0] == pairs[0]
    with pytest.raises(InputError, match="no partner 'ref_rejected_logps'"):
        flip(pairs.remove_columns("ref_rejected_logps"))
    with pytest.raises(InputError, match="no chosen and rejected"):
        flip(pairs.select_columns(["prompt"]))


def test_digest_depends_on_order_and_text_only():
    rows = [TRL, TRL | {"prompt": "Why?"}]
    digest = data_digest(Dataset.from_list(rows))
    assert digest.startswith("blake3:")
    assert digest == data_digest(Dataset.from_list([row | {"extra": 1} for row in rows]))
    assert digest != data_digest(Dataset.from_list(rows[::-1]))


def test_the_tiny_world_loads_like_any_other_data():
    world = TinyWorld("micro")
    loaded = load_preferences(world.preference_rows(), preference="harmless")
    assert (loaded.format, loaded.notes, len(loaded.dataset)) == ("pku-saferlhf", (), world.size.pairs)


@real_data
@pytest.mark.parametrize(("name", "kept"), [("hh-helpful-base", 2339), ("hh-harmless-base", 2303)])
def test_real_hh_rlhf(name, kept):
    loaded = load_preferences(REAL / name / "test.jsonl.gz")
    assert (loaded.format, len(loaded.dataset)) == ("hh-rlhf", kept)
    assert sum(int(note.split()[0]) for note in loaded.notes) + kept in (2354, 2312)
    assert all(row["prompt"][-1]["role"] == "user" for row in loaded.dataset.select(range(50)))


@real_data
def test_real_pku_saferlhf_conflicts_in_19_of_32_pairs():
    helpful, harmless = (
        load_preferences(REAL / "pku-saferlhf-32.json", preference=name).dataset for name in ("helpful", "harmless")
    )
    conflicts = sum(a["chosen"] != b["chosen"] for a, b in zip(helpful, harmless, strict=True))
    assert (len(helpful), conflicts) == (32, 19)

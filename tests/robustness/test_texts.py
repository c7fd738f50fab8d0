"""Labelled texts, from the tiny world and from files."""

import gzip
import json

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness.texts import CATEGORIES, Texts, load_texts

ROWS = [{"prompt": f"question {i}", "type": "odd" if i % 2 else "even", "label": "safe"} for i in range(60)]
PAIRS = [{"prompt": f"question {i}", "response": [f"kind {i}", f"cruel {i}"]} for i in range(60)]


def test_the_tiny_world_in_four_categories():
    train, held = load_texts("micro")
    assert set(train.names) == set(held.names) == set(CATEGORIES)
    assert not {row[0] for row in train.rows} & {row[0] for row in held.rows}, "held-out phrasings"
    assert train.encoding == "pair"
    by_row = dict(zip(train.rows, train.labels, strict=True))
    assert {by_row[row] for row in by_row if row[1].startswith("Sorry, I can't help")} <= {"declined", "over-refusal"}
    assert load_texts("micro")[0].digest == train.digest


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    lines = "\n".join(json.dumps(row) for row in ROWS)
    if suffix == ".csv":
        lines = "prompt,type,label\n" + "\n".join(",".join(row.values()) for row in ROWS)
    elif suffix == ".json":
        lines = json.dumps(ROWS)
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith(".gz") else lines.encode())
    train, held = load_texts(str(path), "type")
    assert (train.names, train.encoding) == (("even", "odd"), "response")
    assert len(train.rows) + len(held.rows) == 60
    assert not set(train.rows) & set(held.rows)


def test_a_text_may_hold_what_ends_a_line_in_print(tmp_path):
    rows = [row | {"prompt": f"{row['prompt']}\u2028and more"} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    train, held = load_texts(str(tmp_path / "rows.jsonl"), "type")
    assert len(train.rows) + len(held.rows) == 60
    (tmp_path / "rows.csv").write_text("prompt,type\nyes, indeed,odd\n")
    with pytest.raises(InputError, match="3 columns where the header names 2"):
        load_texts(str(tmp_path / "rows.csv"), "type")


def test_a_safe_and_an_unsafe_answer_lie_on_one_side(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    train, held = load_texts(str(tmp_path / "pairs.json"))
    assert train.labels.count("safe") == train.labels.count("unsafe")
    assert held.labels.count("safe") == held.labels.count("unsafe") > 0
    assert all(
        text.startswith("kind") for (_, text), label in zip(train.rows, train.labels, strict=True) if label == "safe"
    )


@pytest.mark.parametrize(
    ("rows", "label", "message"),
    [
        (ROWS, None, "two labels or more.* found safe \\(60\\)"),
        (ROWS, "kind", "row 1: no label in column 'kind'; its columns are: prompt, type, label"),
        ([*ROWS, {"type": "odd"}], "type", "row 61: expected a text"),
        ([*ROWS, ["odd"]], "type", "row 61: expected an object"),
        ([*ROWS, {"prompt": "a", "type": "rare"}], "type", "five rows each"),
        ([*ROWS, {"prompt": "a", "response": "b", "type": "odd"}], "type", "give all or none one"),
        ([{"prompt": "a", "response": ["b"]}], None, "first the safe one, then the unsafe one"),
        ([], None, "found no rows"),
    ],
)
def test_mistakes_in_rows(tmp_path, rows, label, message):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        load_texts(str(tmp_path / "rows.json"), label)


def test_mistakes_in_files(tmp_path):
    with pytest.raises(InputError, match="no such file; give `tiny`"):
        load_texts(str(tmp_path / "none.csv"))
    for name, content in (("a.json", b"{"), ("b.jsonl.gz", b"no gzip"), ("c.txt", b"text"), ("d.csv", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_texts(str(tmp_path / name))


def test_a_sample_repeats_nothing():
    texts = Texts(tuple((str(i),) for i in range(20)), ("a", "b") * 10)
    assert len(set(texts.sample(8, seed=3).rows)) == 8
    assert texts.sample(8, seed=3) == texts.sample(8, seed=3)
    assert texts.sample(99) == texts

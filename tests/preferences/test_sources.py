import bz2
import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import load_preferences
from prefvec_ray.preferences.readers import CHUNK
from prefvec_ray.preferences.sources import read_rows

ROWS = [{"prompt": f"How {i}? 茶", "chosen": 'Like\nthis, "so".', "rejected": "No."} for i in range(5)]


def json_lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_csv(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    lines = json_lines()
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "two.jsonl.gz": gzip.compress(lines[:100]) + gzip.compress(lines[100:]),  # as `cat a.gz b.gz` makes
        "a.jsonl.zst": zstd(lines),
        "a.jsonl.bz2": bz2.compress(lines),
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "crlf.jsonl": lines.replace(b"}\n", b"}\r\n\r\n"),
        "a.json": json.dumps(ROWS, indent=2).encode(),
        "bom.json.gz": gzip.compress(b"\xef\xbb\xbf " + json.dumps(ROWS).encode() + b"\n"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_csv(tmp_path / "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    digests = {path.name: load_preferences(path).digest for path in tmp_path.iterdir()}
    assert len(digests) == 12
    assert len(set(digests.values())) == 1, digests


def test_a_json_list_is_decoded_as_it_is_read(tmp_path):
    rows = [{"prompt": "x" * size, "chosen": [1.5, {"a": "]"}], "rejected": None} for size in (10, CHUNK, 3, 2 * CHUNK)]
    rows += [{"prompt": str(i) * 999} for i in range(3000)]
    (tmp_path / "big.json").write_text(json.dumps(rows))
    (tmp_path / "numbers.json").write_text(f"[{'1' * 400000}, {'2' * CHUNK} ]".replace("1" * 400000, "12"))
    assert [at.row for at in read_rows(tmp_path / "big.json")] == rows
    for name, text in {"none.json": "[ ]", "empty.json": " \n"}.items():
        (tmp_path / name).write_text(text)
        assert list(read_rows(tmp_path / name)) == []


def test_a_column_without_a_name_is_one_all_the_same(tmp_path):
    """As pandas writes its index."""
    (tmp_path / "a.csv").write_text(",prompt,chosen,rejected\n0,p,a,b\n")
    assert [at.row for at in read_rows(tmp_path / "a.csv")] == [
        {"": "0", "prompt": "p", "chosen": "a", "rejected": "b"}
    ]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np, with commas, too,a,b\n")
    with pytest.raises(InputError, match="5 columns where the header names 3"):
        list(read_rows(tmp_path / "a.csv"))


def test_labels_in_csv_are_numbers(tmp_path):
    row = {"prompt": "1", "response_0": "0", "response_1": "1", "better_response_id": 1, "safer_response_id": 0}
    write_csv(tmp_path / "a.csv", [row])
    assert [at.row for at in read_rows(tmp_path / "a.csv")] == [row]


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"part-{i}.jsonl").write_bytes(json_lines([row]))
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / ".cache.jsonl").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    found = list(read_rows(tmp_path))
    assert [at.row for at in found] == ROWS
    assert found[-1].where == f"{tmp_path}/part-4.jsonl, row 1"


def test_a_folder_with_splits_asks_which(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        pq.write_table(pa.Table.from_pylist([ROWS[i]]), tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(InputError, match="holds the splits test, train; say which with split"):
        list(read_rows(tmp_path))
    assert [at.row for at in read_rows(tmp_path, split="train")] == ROWS[:2]
    assert [at.row for at in read_rows(tmp_path, split="test")] == ROWS[2:3]
    with pytest.raises(InputError, match="no files of split 'validation'"):
        list(read_rows(tmp_path, split="validation"))


def test_folders_that_are_no_data_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no files of \.jsonl"):
        list(read_rows(tmp_path))
    (tmp_path / "pairs.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"it holds pairs\.pt"):
        list(read_rows(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    write_csv(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"several kinds of files \(1 .csv, 1 .jsonl\)"):
        list(read_rows(tmp_path))


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.Table.from_pylist(ROWS), PARQUET)
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(json_lines(ROWS * 99), mtime=0)[:-9], "cannot be read .*Truncated"),
        ("cut.jsonl.zst", zstd(json_lines(ROWS * 99))[:-9], "cannot be read .*Truncated"),
        ("cut.json", json.dumps(ROWS).encode()[:-1], "the list does not end"),
        ("cut2.json", json.dumps(ROWS).encode()[:-9], "row 5: not JSON"),
        ("tail.json", json.dumps(ROWS).encode() + b"x", "more text after the list"),
        ("comma.json", json.dumps(ROWS).encode().replace(b"},", b"};"), "';' after row 1"),
        ("deep.json", DEEP, "row 1: nested too deeply"),
        ("deep.jsonl", DEEP, "line 1: lists and objects nested deeper"),
        ("nul.jsonl", json_lines() + b"\0\0\0\0", "line 6: not JSON"),
        ("nul.json", b"\0" * 9, "expected a JSON list"),
        ("utf16.jsonl", json_lines().decode().encode("utf-16"), "UTF-8"),
        ("latin.jsonl", json.dumps({"prompt": "é"}, ensure_ascii=False).encode("latin-1"), "UTF-8"),
        ("more.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", r"row 2 \(line 3\): 4 columns"),
        ("less.csv", b"prompt,chosen,rejected\na,b\n", r"row 1 \(line 2\): 2 columns"),
        ("open.csv", b'prompt,chosen,rejected\na,b,"c\n', "not CSV"),
        ("twice.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns have one name"),
        ("cut.parquet", PARQUET.getvalue().to_pybytes()[:-20], "cannot be read"),
        ("empty.parquet", b"", "cannot be read"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=words) as error:
        list(read_rows(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_without_end_is_refused_before_memory_is_full(tmp_path):
    with (tmp_path / "a.jsonl.gz").open("wb") as file, gzip.open(file, "wb", compresslevel=1) as packed:
        for _ in range(80):
            packed.write(b"[" * CHUNK)
    with pytest.raises(InputError, match="line 1: longer than"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


def test_mistakes_in_the_source_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    for source, options, words in (
        (tmp_path / "b.jsonl", {}, "no such file"),
        (tmp_path / "a.jsonl", {"revision": "main"}, "revision is for datasets of the hub"),
        (tmp_path / "a.jsonl", {"split": "train"}, "one file has no splits"),
        ("what://a/b.jsonl", {}, "give a file, a folder or s3://"),
        ("data/rows.jsonl", {}, "no such file"),
    ):
        with pytest.raises(InputError, match=words):
            list(read_rows(source, **options))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Query of `s3://` URIs for an S3 server with a bucket `pairs`."""
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?scheme=http&region=us-east-1&endpoint_override={host}:{port}&allow_bucket_creation=true"
    system, _ = fs.FileSystem.from_uri(f"s3://key:hush-hush@pairs{query}")
    system.create_dir("pairs")
    with system.open_output_stream("pairs/hh/part-0.jsonl.gz", compression=None) as file:
        file.write(gzip.compress(json_lines()))
    yield query
    server.stop()


def test_files_and_folders_in_a_bucket_are_read_like_local_ones(bucket):
    for source in ("hh", "hh/part-0.jsonl.gz"):
        loaded = load_preferences(f"s3://key:hush-hush@pairs/{source}{bucket}")
        assert loaded.dataset.to_list() == ROWS
        assert loaded.source == f"s3://pairs/{source}"
    with pytest.raises(InputError, match="no such file") as error:
        load_preferences(f"s3://key:hush-hush@pairs/absent.jsonl{bucket}")
    assert "hush" not in str(error.value)


@pytest.mark.slow
def test_a_dataset_of_the_hub(tmp_path):
    """Through the real client, against a server on loopback that answers as the hub does."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    script = Path(__file__).parent / "scripts" / "read_hub.py"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["train"] == ROWS[:4]
    assert told["test"] == ROWS[4:]
    assert "has the splits train, test; say which with split" in told["no split"]
    assert "has no split 'dev'; choose one of train, test" in told["wrong split"]
    assert "hub dataset org/absent: no such file here, and the hub did not give it" in told["absent"]

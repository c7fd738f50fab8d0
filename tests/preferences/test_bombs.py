"""A small file may not take more memory than docs/data.md states. Each is read in a process of its own."""

import bz2
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefvec_ray.preferences.readers import MEMORY

READ = """
import resource, sys
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.sources import few, read_rows

def peak(who): return resource.getrusage(who).ru_maxrss * 1024

before = peak(resource.RUSAGE_SELF)
try:
    print(sum(1 for at in few(read_rows(sys.argv[1]))), "rows")
except InputError as error:
    print("refused:", error)
print(peak(resource.RUSAGE_SELF) - before, peak(resource.RUSAGE_CHILDREN))
"""
MIB = 1 << 20


def repeated(path: Path, head: bytes, unit: bytes, mebibytes: int) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        block = unit * (MIB // len(unit))
        for _ in range(mebibytes):
            file.write(block)


def dictionary(path: Path, kind: pa.DataType) -> None:
    """256 rows that share one value of 32 MiB."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["A" * (32 * MIB)]))
    names = ("prompt", "chosen", "rejected")
    table = pa.table(dict.fromkeys(names, column.cast(kind) if kind != column.type else column))
    pq.write_table(table, path, compression="zstd")


BOMBS = {
    "comma.csv.gz": lambda path: repeated(path, b"prompt,chosen,rejected\n", b",", 80),
    "quote.csv.gz": lambda path: repeated(path, b'prompt,chosen,rejected\n"', b"a\n", 80),
    "header.csv.gz": lambda path: repeated(path, b"", b"a,", 80),
    "text.jsonl.gz": lambda path: repeated(path, b'{"prompt":"', b"a", 80),
    "objects.jsonl.gz": lambda path: repeated(path, b'{"prompt":[', b"{},", 80),
    "blank.jsonl.gz": lambda path: repeated(path, b"", b"\n", 80),
    "blank.csv.gz": lambda path: repeated(path, b"prompt,chosen,rejected\n", b"\n", 80),
    "blank.json.gz": lambda path: repeated(path, b"[", b" ", 80),
    "lists.json.gz": lambda path: repeated(path, b"[[", b"[],", 80),
    "rows.jsonl.gz": lambda path: repeated(path, b"", b'{"prompt":"a"}\n\n', 80),
    "text.json.bz2": lambda path: path.write_bytes(bz2.compress(b'["' + b"a" * (100 * MIB), 1)),
    "values.parquet": lambda path: dictionary(path, pa.dictionary(pa.int32(), pa.string())),
    "nulls.parquet": lambda path: pq.write_table(
        pa.table({"prompt": pa.array([[None] * 20_000_000], pa.list_(pa.null()))}), path, compression="zstd"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_refused_within_the_bound(tmp_path, name):
    path = tmp_path / name
    BOMBS[name](path)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    end, peaks = done.stdout.splitlines()
    own, child = map(int, peaks.split())
    assert end.startswith(f"refused: {path}"), end
    assert own < MEMORY, f"{own / MIB:.0f} MiB"
    assert child < MEMORY + 512 * MIB, f"{child / MIB:.0f} MiB, of which an interpreter with Arrow takes some"


@pytest.mark.slow
def test_a_large_row_within_the_limits_is_read(tmp_path):
    """What the bounds are not for: rows of some megabytes, and text that repeats a little."""
    chance = random.Random(0)
    rows = [{"prompt": chance.randbytes(1 << 20).hex(), "chosen": str(i), "rejected": "b"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row | {"prompt": f"How {row['chosen']}?"}) + "\n" for row in rows)
    for name in ("a.parquet", "a.jsonl.gz"):
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[0] == "40 rows", done.stdout

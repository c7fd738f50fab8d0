"""Rows one by one from wherever they lie: files, folders of shards, buckets, the Hugging Face hub.

Memory does not grow with the file. Nothing is executed and nothing unpickled: JSON, CSV and Parquet only.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from pyarrow import ArrowException, fs

from prefvec_ray.errors import InputError
from prefvec_ray.preferences.formats import PKU_LABELS

KINDS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = ("", ".gz", ".zst", ".bz2")
ROW_LIMIT = 64 << 20
"""Characters. A longer row is a file without line ends or a quote that never closes."""
CHUNK = 1 << 20

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SPLIT = re.compile(r"(?:^|[^a-zA-Z])(train|test|validation|valid|dev|eval)(?=$|[^a-zA-Z])")
_BLANKS = {" ", "\t", "\r", "\n"}
_DESCRIBES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Numbered(NamedTuple):
    """A row and where it was found, for messages."""

    file: str
    number: int
    row: Any

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


def label(source: str) -> str:
    """The source without credentials, for messages and records."""
    return re.sub(r"//[^/@]*@", "//", source).partition("?")[0] if "://" in source else source


def read_rows(
    source: str | Path, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> Iterator[Numbered]:
    """Rows of a source, in order.

    Args:
        source: a file (.jsonl, .json with one list, .csv, .parquet; the first three also .gz, .zst, .bz2); a folder
            of such files, read in the order of their names; either of them in a bucket (`s3://`, `gs://`, `abfs://`,
            `hf://`), options in the query as pyarrow's filesystems take them; or a dataset of the hub,
            `org/name` or `org/name:subset`. What exists as a path is a path.
        split: of a hub dataset; of a folder, only files with this word in their name.
        subset: of a hub dataset, its configuration.
        revision: of a hub dataset, a branch, tag or commit.

    Raises:
        InputError: naming the file, and the row or line (from 1) where there is one.
    """
    text = str(source)
    hub = _HUB.fullmatch(text) if not Path(text).exists() and "://" not in text else None
    if hub and not _kind(text):
        yield from _hub_rows(hub[1], hub[2] or subset, split, revision)
        return
    for name, value in {"subset": subset, "revision": revision}.items():
        if value is not None:
            raise InputError(f"{label(text)}: {name} is for datasets of the hub; this is a file or a folder")
    for system, path, shown in _files(text, split):
        with _told(shown):
            yield from _READERS[_kind(path)](system, path, shown)


def _kind(path: str) -> str:
    """`.jsonl` of rows.jsonl.gz; empty for what cannot be read."""
    name = PurePosixPath(path).name.lower()
    return next((kind for kind in KINDS for packed in PACKED if name.endswith(kind + packed)), "")


@contextmanager
def _told(shown: str) -> Iterator[None]:
    """What a broken file or a bucket out of reach raises, as an InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: cannot be read as UTF-8 text ({error}); write the file again as UTF-8") from error
    except (ArrowException, OSError, EOFError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{shown}: cannot be read ({why:.300}); check that it is whole and in reach") from error


def _files(text: str, split: str | None) -> list[tuple[Any, str, str]]:
    """(filesystem, path, name for messages) of every file of the source."""
    shown = label(text)
    system: Any = fs.LocalFileSystem()
    root = text
    if "://" in text:
        try:
            system, root = fs.FileSystem.from_uri(text)
        except (ArrowException, OSError, ValueError, ImportError) as error:
            raise InputError(f"{shown}: {error}; give a file, a folder or s3://bucket/path") from error
    with _told(shown):
        info = system.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"{shown}: no such file; check the path, or give a hub dataset as org/name")
    if info.type == fs.FileType.File:
        if not _kind(root):
            raise InputError(f"{shown}: cannot read this kind of file; give one of {', '.join(KINDS)}, or .jsonl.gz")
        if split is not None:
            raise InputError(f"{shown}: one file has no splits, leave out {split!r}; or give a folder or a hub dataset")
        return [(system, root, shown)]
    with _told(shown):
        entries = system.get_file_info(fs.FileSelector(root, recursive=True))
    inside = {e.path: str(PurePosixPath(e.path).relative_to(PurePosixPath(root))) for e in entries if e.is_file}
    inside = {path: name for path, name in inside.items() if not re.search(r"(^|/)[._]", name)}
    found = sorted(path for path, name in inside.items() if _kind(name) and Path(name).name not in _DESCRIBES)
    splits = {path: {_known(word) for word in _SPLIT.findall(inside[path])} for path in found}
    if split is not None:
        found = [path for path in found if _known(split) in splits[path] or split in Path(inside[path]).name.split(".")]
    others = f" (it holds {', '.join(sorted(inside.values())[:3])})" if inside else ""
    if not found:
        what = f"no files of split {split!r}" if split is not None else f"no files of {', '.join(KINDS)}"
        raise InputError(f"{shown}: {what} in this folder{others}")
    kinds = Counter(_kind(path) for path in found)
    if len(kinds) > 1:
        raise InputError(f"{shown}: holds several kinds of files ({_counts(kinds)}); name the file, or a folder of one")
    named = {word for path in found for word in splits[path]}
    if split is None and len(named) > 1:
        raise InputError(f"{shown}: holds the splits {', '.join(sorted(named))}; say which with split")
    return [(system, path, f"{shown.rstrip('/')}/{inside[path]}") for path in found]


def _known(split: str) -> str:
    return "validation" if split in ("valid", "dev", "eval") else split


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counter.items())


def _open_text(system: Any, path: str) -> io.TextIOWrapper:
    """UTF-8, with or without a byte order mark, unpacked by the ending of the name."""
    return io.TextIOWrapper(system.open_input_stream(path, compression="detect"), encoding="utf-8-sig", newline="")


def _json_lines(system: Any, path: str, shown: str) -> Iterator[Numbered]:
    with _open_text(system, path) as lines:
        for number in range(1, sys.maxsize):
            line = lines.readline(ROW_LIMIT)
            if not line:
                return
            if len(line) == ROW_LIMIT:
                raise InputError(f"{shown}, line {number}: longer than {ROW_LIMIT} characters; write one object a line")
            if not line.isspace():
                yield Numbered(shown, number, _decoded(line, f"{shown}, line {number}", "write one object a line"))


def _decoded(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {advice}") from error


def _skip(text: str, place: int) -> int:
    """Where the white space at `place` ends."""
    while text[place : place + 1] in _BLANKS:
        place += 1
    return place


def _json_list(system: Any, path: str, shown: str) -> Iterator[Numbered]:
    """The elements of one JSON list, decoded as they are read: never the whole file at once."""
    decode = json.JSONDecoder().raw_decode
    advice = "if it has one object a line, name it .jsonl"
    with _open_text(system, path) as file:
        text = file.read(CHUNK)
        place, number = _skip(text, 0), 0
        if place == len(text):
            return
        if text[place] != "[":
            raise InputError(f"{shown}: expected a JSON list of rows, found {text[place : place + 20]!r}; {advice}")
        place += 1
        while True:
            try:
                first = _skip(text, place)
                if not number and text[first] == "]":
                    after = first
                else:
                    row, after = decode(text, first)
                    after = _skip(text, after)
                    number += text[after] in ",]"
                    yield Numbered(shown, number, row)
                if text[after] not in ",]":
                    raise InputError(f"{shown}: not JSON ({text[after]!r} after row {number + 1}); {advice}")
                if text[after] == "]":
                    break
                place = after + 1
            except RecursionError as error:
                raise InputError(f"{shown}, row {number + 1}: nested too deeply") from error
            except (json.JSONDecodeError, IndexError) as error:  # not all of the row is here yet, or it is broken
                more = file.read(max(CHUNK, len(text) - place))
                if not more or len(text) - place > ROW_LIMIT:
                    why = error.msg if isinstance(error, json.JSONDecodeError) else "the list does not end"
                    raise InputError(f"{shown}, row {number + 1}: not JSON ({why}); {advice}") from error
                text, place = text[place:] + more, 0
        if (text[after + 1 :] + file.read(CHUNK)).strip():
            raise InputError(f"{shown}: not JSON (more text after the list); {advice}")


def _csv(system: Any, path: str, shown: str) -> Iterator[Numbered]:
    """CSV with a header. It has no types: labels that are 0 or 1 elsewhere are read as such, the rest is text."""
    csv.field_size_limit(ROW_LIMIT)
    with _open_text(system, path) as file:
        rows: csv.DictReader[Any] = csv.DictReader(file, strict=True)
        header = rows.fieldnames or []
        if len(set(header)) < len(header):
            raise InputError(f"{shown}: two columns have one name in the header {', '.join(header)}; rename one")
        try:
            for number, row in enumerate(rows, start=1):
                surplus = row.pop(None, [])
                found = len(row) - sum(value is None for value in row.values()) + len(surplus)
                if found != len(header):
                    raise InputError(
                        f"{shown}, row {number} (line {rows.line_num}): {found} columns where the header names "
                        f"{len(header)}; put quotes around commas and line ends"
                    )
                for name in row.keys() & set(PKU_LABELS.values()):
                    row[name] = int(row[name]) if row[name] in ("0", "1") else row[name]
                yield Numbered(shown, number, row)
        except csv.Error as error:
            raise InputError(f"{shown}, line {rows.line_num}: not CSV ({error}); write the file again") from error


def _parquet(system: Any, path: str, shown: str) -> Iterator[Numbered]:
    number = 0
    with system.open_input_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Numbered(shown, number, row)


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}


def _hub_rows(name: str, subset: str | None, split: str | None, revision: str | None) -> Iterator[Numbered]:
    """Through `datasets`, which downloads once and keeps Arrow files in its cache."""
    from datasets import load_dataset_builder

    shown = f"hub dataset {name}" + (f":{subset}" if subset else "")
    try:
        builder = load_dataset_builder(name, subset, revision=revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in ("json", "csv", "parquet", "arrow"):
            raise InputError(f"{shown}: its files are read as {kind}; expected JSON, CSV, Parquet or Arrow")
        builder.download_and_prepare()
        splits = list(builder.info.splits or {})
        if split is None and len(splits) > 1:
            raise InputError(f"{shown}: has the splits {', '.join(splits)}; say which with split")
        if split is not None and split not in splits:
            raise InputError(f"{shown}: has no split {split!r}; choose one of {', '.join(splits)}")
        rows = builder.as_dataset(split=split or splits[0])
    except InputError:
        raise
    except Exception as error:  # the client's own errors have no common class
        why = " ".join(str(error).split())
        raise InputError(f"{shown}: no such file here, and the hub did not give it: {why:.300}") from error
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield Numbered(shown, number, row)

"""Rows one by one from wherever they lie: files, folders of shards, buckets, the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException, fs

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.redact import source_name
from prefvec_ray.preferences.readers import KINDS, ROW_LIMIT, Numbered, SourceFile, kind_of, read_file, reported

KEPT_ROWS, KEPT_CHARACTERS = 500_000, 128 << 20
"""Of a file whose rows are all held in memory at once, such as prompts."""

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SPLIT = re.compile(r"(?:^|[^a-zA-Z])(train|test|validation|valid|dev|eval)(?=$|[^a-zA-Z])")
_DESCRIBES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


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
    if hub and not kind_of(text):
        yield from _hub_rows(hub[1], hub[2] or subset, split, revision)
        return
    for name, value in {"subset": subset, "revision": revision}.items():
        if value is not None:
            raise InputError(f"{source_name(text)}: {name} is for datasets of the hub; this is a file or a folder")
    for file in _files(text, split):
        yield from read_file(file)


def few(rows: Iterable[Numbered]) -> Iterator[Numbered]:
    """The same rows, for a caller that keeps them all in memory.

    Raises:
        InputError: more than `KEPT_ROWS` rows, or more than `KEPT_CHARACTERS` characters in them.
    """
    size = 0
    for count, at in enumerate(rows, start=1):
        size += _size(at.row)
        if count > KEPT_ROWS or size > KEPT_CHARACTERS:
            raise InputError(
                f"{at.where}: more than {KEPT_ROWS:,} rows or {KEPT_CHARACTERS >> 20} million characters, the most "
                "that are kept in memory; give a part of the file"
            )
        yield at


def text_lines(path: Path) -> Iterator[Numbered]:
    """The lines of a local UTF-8 file, without their ends. InputError as `read_rows`; OSError where it is not there."""
    with path.open(encoding="utf-8-sig") as file:
        for number in range(1, sys.maxsize):
            try:
                line = file.readline(ROW_LIMIT)
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text ({error}); write it as UTF-8") from error
            if not line:
                return
            if len(line) == ROW_LIMIT:
                raise InputError(f"{path}, line {number}: longer than {ROW_LIMIT} characters")
            yield Numbered(str(path), number, line.removesuffix("\n"))


def _size(row: Any) -> int:
    """Characters of all texts in a row; every other value counts as 16."""
    total, waiting = 0, [row]
    while waiting:
        value = waiting.pop()
        total += 16 + (len(value) if isinstance(value, str) else 0)
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return total


def _files(text: str, split: str | None) -> list[SourceFile]:
    """Every file of the source, in order."""
    shown = source_name(text)
    system: Any = fs.LocalFileSystem()
    root, uri = text, text if "://" in text else None
    if uri is not None:
        try:
            system, root = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError, ImportError) as error:
            why = str(error).replace(uri, shown)
            raise InputError(f"{shown}: {why:.300}; give a file, a folder or s3://bucket/path") from error
    with reported(shown):
        info = system.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"{shown}: no such file; check the path, or give a hub dataset as org/name")
    if info.type == fs.FileType.File:
        if not kind_of(root):
            raise InputError(f"{shown}: cannot read this kind of file; give one of {', '.join(KINDS)}, or .jsonl.gz")
        if split is not None:
            raise InputError(f"{shown}: one file has no splits, leave out {split!r}; or give a folder or a hub dataset")
        return [SourceFile(system, root, shown, info.size, uri)]
    if info.type != fs.FileType.Directory:
        raise InputError(f"{shown}: neither a file nor a folder (a pipe or a device?); copy its content to a file")
    with reported(shown):
        entries = system.get_file_info(fs.FileSelector(root, recursive=True))
    inside = {e.path: str(PurePosixPath(e.path).relative_to(PurePosixPath(root))) for e in entries if e.is_file}
    sizes = {entry.path: entry.size for entry in entries}
    inside = {path: name for path, name in inside.items() if not re.search(r"(^|/)[._]", name)}
    found = sorted(path for path, name in inside.items() if kind_of(name) and Path(name).name not in _DESCRIBES)
    splits = {path: {_known(word) for word in _SPLIT.findall(inside[path])} for path in found}
    if split is not None:
        found = [path for path in found if _known(split) in splits[path] or split in Path(inside[path]).name.split(".")]
    others = f" (it holds {', '.join(sorted(inside.values())[:3])})" if inside else ""
    if not found:
        what = f"no files of split {split!r}" if split is not None else f"no files of {', '.join(KINDS)}"
        raise InputError(f"{shown}: {what} in this folder{others}")
    kinds = Counter(kind_of(path) for path in found)
    if len(kinds) > 1:
        raise InputError(f"{shown}: holds several kinds of files ({_counts(kinds)}); name the file, or a folder of one")
    named = {word for path in found for word in splits[path]}
    if split is None and len(named) > 1:
        raise InputError(f"{shown}: holds the splits {', '.join(sorted(named))}; say which with split")
    return [SourceFile(system, path, f"{shown.rstrip('/')}/{inside[path]}", sizes[path], uri) for path in found]


def _known(split: str) -> str:
    return "validation" if split in ("valid", "dev", "eval") else split


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counter.items())


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

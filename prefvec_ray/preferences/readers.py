"""The rows of one file: JSON lines, a JSON list, CSV or Parquet, the first three also packed.

Memory does not grow with the file, whatever it holds: reading takes at most `MEMORY` bytes. Nothing is executed and
nothing unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pyarrow import ArrowException, CompressedInputStream

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import check_depth, parse_json
from prefvec_ray.common.redact import redact
from prefvec_ray.preferences import parquet_process
from prefvec_ray.preferences.formats import PKU_LABELS

KINDS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
MEMORY = 1 << 30
"""Bytes that reading takes at most, beside the interpreter and its libraries, whatever the file holds."""
ROW_LIMIT = 16 << 20
"""Characters. A longer row is a file without line ends or a quote that never closes. As JSON, no row of this length
takes more than half of `MEMORY`."""
RATIO, FREE = 200, 64 << 20
"""A compressed file, or a Parquet file, may hold `FREE` bytes, or `RATIO` times its own size if that is more. Text
compresses 3 to 10 times; a file that was made to fill a disk or to keep a processor busy, 1,000 times and more."""
COLUMNS_LIMIT = 10_000
BLANK_LINES = 10_000
"""One after another; more are no text, and would only keep a processor busy."""
CHUNK = 1 << 20

_BLANKS = re.compile(r"[ \t\r\n]*")


class Numbered(NamedTuple):
    """A row and where it was found, for messages."""

    file: str
    number: int
    row: Any

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


class SourceFile(NamedTuple):
    """One file of a source."""

    system: Any
    path: str
    shown: str
    """name for messages"""
    size: int | None
    """bytes"""
    uri: str | None
    """the source, where it is no local path"""


def kind_of(path: str) -> str:
    """`.jsonl` of rows.jsonl.gz; empty for what cannot be read."""
    name = PurePosixPath(path).name.lower()
    return next((kind for kind in KINDS for packed in PACKED if name.endswith(kind + packed)), "")


def read_file(file: SourceFile) -> Iterator[Numbered]:
    """The rows of a file of a known kind, in order. InputError names the file, and the row or line (from 1)."""
    with reported(file.shown):
        yield from _READERS[kind_of(file.path)](file)


@contextmanager
def reported(shown: str) -> Iterator[None]:
    """Around reading: what a broken file or a bucket out of reach raises becomes an InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: cannot be read as UTF-8 text ({error}); write the file again as UTF-8") from error
    except (ArrowException, OSError, EOFError) as error:
        why = redact(" ".join(str(error).split()))
        raise InputError(f"{shown}: cannot be read ({why:.300}); check that it is whole and in reach") from error


class _Bounded(io.RawIOBase):
    """Bytes of `stream`, until there are more than a file of `size` bytes may hold: then InputError."""

    def __init__(self, stream: Any, file: SourceFile) -> None:
        self.stream, self.shown, self.count = stream, file.shown, 0
        self.limit = None if file.size is None else max(FREE, RATIO * file.size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        self.count += len(data)
        if self.limit is not None and self.count > self.limit:
            raise InputError(
                f"{self.shown}: holds more than {RATIO} times its own size (and more than {FREE >> 20} MiB); if it is "
                "meant to, unpack it or write it as .jsonl first"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


def _open_text(file: SourceFile) -> io.TextIOWrapper:
    """UTF-8, with or without a byte order mark, unpacked by the ending of the name."""
    stream = file.system.open_input_stream(file.path, compression=None)
    codec = next((codec for end, codec in PACKED.items() if end and file.path.lower().endswith(end)), None)
    if codec is not None:
        stream = CompressedInputStream(stream, codec)
    raw = io.BufferedReader(_Bounded(stream, file), CHUNK)
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _json_lines(file: SourceFile) -> Iterator[Numbered]:
    with _open_text(file) as lines:
        yield from _decoded_lines(lines, file.shown, "line")


def _decoded_lines(lines: io.TextIOWrapper, shown: str, unit: str) -> Iterator[Numbered]:
    blank = 0
    for number in range(1, sys.maxsize):
        line = lines.readline(ROW_LIMIT)
        if not line:
            return
        where = f"{shown}, {unit} {number}"
        blank = blank + 1 if line.isspace() else 0
        if blank > BLANK_LINES:
            raise InputError(f"{where}: {blank} blank lines one after another; remove them")
        if len(line) == ROW_LIMIT:
            raise InputError(f"{where}: longer than {ROW_LIMIT} characters; shorten it, or write one object a line")
        if not line.isspace():
            yield Numbered(shown, number, parse_json(line, where, "write one object a line"))


def _skip(text: str, place: int) -> int:
    """Where the white space at `place` ends."""
    found = _BLANKS.match(text, place)
    return found.end() if found else place


def _json_list(file: SourceFile) -> Iterator[Numbered]:
    """The elements of one JSON list, decoded as they are read: never the whole file at once."""
    decode = json.JSONDecoder().raw_decode
    shown, advice = file.shown, "if it has one object a line, name it .jsonl"
    with _open_text(file) as source:
        text = source.read(CHUNK)
        place, number = _skip(text, 0), 0
        if place == len(text):
            return
        if text[place] != "[":
            raise InputError(f"{shown}: expected a JSON list of rows, found {text[place : place + 20]!r}; {advice}")
        place += 1
        while True:
            where = f"{shown}, row {number + 1}"
            try:
                first = _skip(text, place)
                if not number and text[first] == "]":
                    after = first
                else:
                    row, end = decode(text, first)
                    after = _skip(text, end)
                    check_depth(row, where, "flatten it")
                    number += text[after] in ",]"
                    yield Numbered(shown, number, row)
                if text[after] not in ",]":
                    raise InputError(f"{shown}: not JSON ({text[after]!r} after row {number + 1}); {advice}")
                if text[after] == "]":
                    break
                place = after + 1
            except RecursionError as error:
                raise InputError(f"{where}: nested too deeply; flatten it") from error
            except (json.JSONDecodeError, IndexError) as error:  # not all of the row is here yet, or it is broken
                more = source.read(max(CHUNK, len(text) - place)) if len(text) - place <= ROW_LIMIT else ""
                if not more:
                    why = error.msg if isinstance(error, json.JSONDecodeError) else "the list does not end"
                    raise InputError(f"{where}: not JSON, or too long ({why}); {advice}") from error
                text, place = text[place:] + more, 0
            except ValueError as error:  # an integer of more digits than Python converts
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{where}: not JSON ({error}); {advice}") from error
        if (text[after + 1 :] + source.read(CHUNK)).strip():
            raise InputError(f"{shown}: not JSON (more text after the list); {advice}")


class _Lines:
    """Lines for the csv module: no row, however many lines it has, is longer than `ROW_LIMIT`."""

    def __init__(self, file: io.TextIOWrapper, shown: str) -> None:
        self.file, self.shown, self.row = file, shown, 0
        self.taken = self.blank = 0
        """characters since the last row ended, and blank lines one after another"""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(ROW_LIMIT + 1 - self.taken)
        self.taken += len(line)
        if self.taken > ROW_LIMIT:
            why = "is a quote never closed?"
            raise InputError(f"{self.shown}, row {self.row + 1}: longer than {ROW_LIMIT} characters; {why}")
        if not line:
            raise StopIteration
        self.blank = self.blank + 1 if line.isspace() else 0
        if self.blank > BLANK_LINES:
            raise InputError(
                f"{self.shown}, row {self.row + 1}: {self.blank} blank lines one after another; remove them"
            )
        return line


def _csv(file: SourceFile) -> Iterator[Numbered]:
    """CSV with a header. It has no types: labels that are 0 or 1 elsewhere are read as such, the rest is text."""
    csv.field_size_limit(ROW_LIMIT)
    shown = file.shown
    with _open_text(file) as text:
        lines = _Lines(text, shown)
        rows: csv.DictReader[Any] = csv.DictReader(lines, strict=True)
        try:
            header = rows.fieldnames or []
            if len(header) > COLUMNS_LIMIT:
                raise InputError(f"{shown}: more than {COLUMNS_LIMIT} columns; is the first line a header?")
            if len(set(header)) < len(header):
                raise InputError(f"{shown}: two columns have one name in the header {', '.join(header)}; rename one")
            lines.taken = 0
            for number, row in enumerate(rows, start=1):
                lines.taken, lines.row = 0, number
                yield Numbered(shown, number, _csv_row(row, header, f"{shown}, row {number} (line {rows.line_num})"))
        except csv.Error as error:
            raise InputError(f"{shown}, line {rows.line_num}: not CSV ({error}); write the file again") from error


def _csv_row(row: dict[Any, Any], header: Any, where: str) -> dict[Any, Any]:
    surplus = row.pop(None, [])
    found = len(row) - sum(value is None for value in row.values()) + len(surplus)
    if found != len(header):
        raise InputError(
            f"{where}: {found} columns where the header names {len(header)}; put quotes around commas and line ends"
        )
    for name in row.keys() & set(PKU_LABELS.values()):
        row[name] = int(row[name]) if row[name] in ("0", "1") else row[name]
    return row


def _parquet(file: SourceFile) -> Iterator[Numbered]:
    """Rows from a process of its own, see `parquet_process`."""
    command = [sys.executable, "-P", str(parquet_process.__file__)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps({"uri": file.uri, "path": file.path, "memory": MEMORY}).encode())
            process.stdin.close()
            raw = io.BufferedReader(_Bounded(process.stdout, file), CHUNK)
            yield from _decoded_lines(io.TextIOWrapper(raw, encoding="utf-8"), file.shown, "row")
            status, why = process.wait(), process.stderr.read().decode("utf-8", "replace")
        finally:
            process.kill()
    if status == parquet_process.DAMAGED:
        raise InputError(f"{file.shown}: cannot be read ({why}); check that it is whole and in reach")
    if status:
        raise InputError(
            f"{file.shown}: damaged, or a row that takes more than {MEMORY >> 20} MiB of memory (reader ended with "
            f"status {status}); write it again, as .jsonl if it is meant to be so"
        )


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}

"""Preference pairs from wherever they lie, in the form that TRL trains on: prompt, chosen, rejected.

Rows stream through the format's function into one memory-mapped Arrow file, so memory does not grow with the data. What
cannot be read is refused with file and row before anything is trained.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from blake3 import blake3
from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable

from prefvec_ray.common.chat import fold_system
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.redact import source_name
from prefvec_ray.preferences.formats import (
    COLUMNS,
    FORMATS,
    PKU_LABELS,
    Format,
    Pair,
    Row,
    UnusableError,
    find_format,
)
from prefvec_ray.preferences.readers import Numbered
from prefvec_ray.preferences.sources import read_rows

System = Literal["keep", "fold"]

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = {form: Features(dict.fromkeys(COLUMNS, kind)) for form, kind in ((str, Value("string")), (list, _MESSAGES))}
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 16 << 20


@dataclass(frozen=True)
class Preferences:
    """Preference pairs, ready to train on."""

    dataset: Dataset
    """Columns prompt, chosen, rejected: text, or lists of chat messages (TRL's conversational form)."""
    format: str
    source: str
    digest: str
    """`data_digest(dataset)`."""
    notes: tuple[str, ...] = ()
    """What was left out or changed, and why."""
    why: str = ""
    """Why it is read as this format: by the fields of its first row, or because the format was given."""
    rows: int = 0
    """Rows read, those included that were dropped or cannot be read."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Of data whose two answers have places (PKU-SafeRLHF): how often each place was the chosen one."""


def load_preferences(
    source: str | Path | Sequence[Row],
    *,
    preference: str | None = None,
    format: str | None = None,
    rows: int | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    system: System = "keep",
    flaws: list[str] | None = None,
) -> Preferences:
    """Read preference pairs and check every one of them.

    Args:
        source: what `read_rows` reads (a file, a folder, a bucket, a hub dataset), or the rows themselves.
        preference: which label orders a pair that is labelled for several ("helpful" or "harmless" in PKU-SafeRLHF);
            formats with one label ignore it.
        format: a name of `FORMATS`; found by the fields of the first row when left out.
        rows: read only the first so many rows.
        split, subset, revision: see `read_rows`.
        system: "fold" puts a system message at the top of the first user message, for a base whose chat template
            takes no system messages. "keep" leaves it.
        flaws: a list that takes the rows that cannot be used, one line each, in place of an error at the first.

    Pairs without a preference are dropped, counted and noted: two identical answers, and the flaws of published files
    (an empty prompt or answer, two transcripts of different conversations). Everything else that is wrong is refused.

    Raises:
        InputError: naming the file, the row (from 1) and what to do.
    """
    name = source_name(str(source)) if isinstance(source, str | Path) else "the given rows"
    if rows is not None and rows < 1:
        raise InputError(f"rows={rows}: ask for at least one row, or leave it out to read all")
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown preference format {format!r}; choose one of: {', '.join(FORMATS)}")
    numbered: Iterable[Numbered]
    if isinstance(source, str | Path):
        numbered = read_rows(source, split=split, subset=subset, revision=revision)
    else:
        numbered = (Numbered(name, number, row) for number, row in enumerate(source, start=1))
    reader = _Pairs(name, FORMATS[format] if format else None, preference, rows, system, flaws)
    dataset, digest = _to_dataset(reader.read(numbered))
    if dataset is None or reader.format is None:
        why = "; ".join(reader.notes + (flaws or [])[:1]) or "it holds no rows"
        raise InputError(f"{name}: nothing to train on ({why}); give a file with at least one preference pair")
    return Preferences(
        dataset=dataset,
        format=reader.format.name,
        source=name,
        digest=digest,
        notes=tuple(reader.notes),
        why="given" if format else f"its first row has the fields {', '.join(reader.fields)}",
        rows=reader.rows,
        dropped=dict(reader.dropped),
        labels=dict(reader.labels),
    )


def first_format(source: str | Path, **options: Any) -> str:
    """Name of the format of the first row of a source; `options` are those of `read_rows`."""
    at = next(iter(read_rows(source, **options)), None)
    if at is None or not isinstance(at.row, Mapping):
        raise InputError(
            f"{source_name(str(source))}: nothing to train on (the first row is no object with named fields)"
        )
    return find_format(at.row, at.file).name


@dataclass
class _Pairs:
    """Rows to pairs, counting what happens to them on the way."""

    name: str
    format: Format | None
    preference: str | None
    limit: int | None
    system: System
    flaws: list[str] | None
    rows: int = 0
    folded: int = 0
    fields: list[str] = field(default_factory=list)
    chats: bool | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> list[str]:
        notes = [f"{count} pairs dropped: {reason}" for reason, count in self.dropped.items()]
        if self.folded:
            notes.append(f"{self.folded} system messages folded into the first user message")
        return notes

    def read(self, numbered: Iterable[Numbered]) -> Iterator[Pair]:
        for at in numbered:
            if self.rows == self.limit:
                return
            self.rows += 1
            try:
                yield self._pair(at)
            except UnusableError as reason:
                self.dropped[str(reason)] += 1
            except InputError as error:
                if self.flaws is None or self.format is None:
                    raise
                self.flaws.append(str(error))

    def _pair(self, at: Numbered) -> Pair:
        row = at.row
        if not isinstance(row, Mapping):
            raise InputError(f"{at.where}: expected an object with named fields, found {type(row).__name__}")
        if self.format is None:
            self.format = find_format(row, self.name)
        self.fields = self.fields or [str(name) for name in row]
        pair = self.format.pair(row, at.where, self.preference)
        if pair["chosen"] == pair["rejected"]:
            raise UnusableError("the two answers are identical")
        chat = isinstance(pair["prompt"], list)
        self.chats = chat if self.chats is None else self.chats
        if chat is not self.chats:
            raise InputError(f"{at.where}: plain-text and conversational rows are mixed; use one form")
        if self.format.name == "pku-saferlhf":
            self.labels[f"response_{row[PKU_LABELS[str(self.preference)]]}"] += 1
        if self.system == "fold" and chat and pair["prompt"][0]["role"] == "system":
            pair["prompt"] = _fold(pair["prompt"], at.where)
            self.folded += 1
        return pair


def _fold(prompt: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    try:
        return [*fold_system(prompt[:2]), *prompt[2:]]
    except InputError:
        message = "a system message can be folded only into a user message right after it"
        raise InputError(f"{where}: {message}") from None


def _to_dataset(pairs: Iterator[Pair]) -> tuple[Dataset | None, str]:
    """All pairs in one Arrow file that is mapped into memory and already has no name, and their digest.

    The file vanishes with the last reader; None where there are no pairs. JobError where there is no room for it.
    """
    hasher = blake3()
    first = next(pairs, None)
    if first is None:
        return None, ""
    features = _FEATURES[type(first["prompt"])]
    schema = features.arrow_schema
    try:
        with tempfile.NamedTemporaryFile(prefix="prefvec-pairs-", suffix=".arrow") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                batch: list[Pair] = [first]
                size = _add(hasher, first)
                for pair in pairs:
                    if len(batch) >= _BATCH_ROWS or size > _BATCH_CHARACTERS:
                        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                        batch, size = [], 0
                    batch.append(pair)
                    size += _add(hasher, pair)
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            file.flush()
            table = pa.ipc.open_stream(pa.memory_map(file.name)).read_all()
    except OSError as error:  # the readers raise InputError for theirs
        folder = tempfile.gettempdir()
        raise JobError(f"cannot write the pairs to {folder} ({error}); make room, or set TMPDIR to another") from error
    digest = f"blake3:{hasher.hexdigest()}"
    return Dataset(InMemoryTable(table), fingerprint=hasher.hexdigest()[:16]), digest


def _add(hasher: Any, pair: Mapping[str, Any]) -> int:
    """Add a pair to a digest; returns the length of what was added, in bytes."""
    line = json.dumps([pair[name] for name in COLUMNS], ensure_ascii=False, sort_keys=True)
    data = line.encode("utf-8", "surrogatepass") + b"\n"
    hasher.update(data)
    return len(data)


def data_digest(dataset: Dataset) -> str:
    """`blake3:<hex>` of prompt, chosen and rejected of every row, in order. Other columns do not count."""
    hasher = blake3()
    for row in iter_rows(dataset):
        _add(hasher, row)
    return f"blake3:{hasher.hexdigest()}"


def iter_rows(dataset: Dataset, columns: Sequence[str] = COLUMNS) -> Iterator[dict[str, Any]]:
    """Rows as dicts, a batch of Arrow at a time: several times faster than one by one."""
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(_BATCH_ROWS):
        yield from batch.to_pylist()


def flip(dataset: Dataset) -> Dataset:
    """The other polarity: every column about the chosen answer swaps names with its partner about the
    rejected one, reference log-probabilities and tokenized answers included, so that a flipped run reuses
    the same reference pass."""
    swap = {}
    for name in dataset.column_names:
        if "chosen" in name:
            partner = name.replace("chosen", "rejected")
            if partner not in dataset.column_names:
                raise InputError(f"cannot flip: column {name!r} has no partner {partner!r}")
            swap[name], swap[partner] = partner, name
    if "chosen" not in swap and "chosen_ids" not in swap:
        raise InputError(f"cannot flip: no chosen and rejected columns among {', '.join(dataset.column_names)}")
    return dataset.rename_columns(swap)

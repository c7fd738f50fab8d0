"""Preference pairs from a file, in the form that TRL trains on: prompt, chosen, rejected.

A format is a small class with the columns it is known by and a function from one row to one pair; the
format is found by its columns. What cannot be read is refused with file and row before anything is trained.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from datasets import Dataset

from prefvec_ray.errors import InputError

Row = Mapping[str, Any]
Pair = dict[str, Any]

COLUMNS = ("prompt", "chosen", "rejected")
PKU_LABELS = {"helpful": "better_response_id", "harmless": "safer_response_id"}
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


class _UnusableError(Exception):
    """This pair says nothing, for a reason known to occur in the published data: drop it and count it."""


@dataclass(frozen=True)
class Preferences:
    """Preference pairs, ready to train on.

    `dataset` has columns prompt, chosen, rejected: text, or lists of chat messages (TRL's conversational
    form). `digest` is `data_digest(dataset)`. `notes` says in plain lines what was left out and why.
    """

    dataset: Dataset
    format: str
    source: str
    digest: str
    notes: tuple[str, ...] = ()


def load_preferences(
    source: str | Path | Sequence[Row],
    *,
    preference: str | None = None,
    format: str | None = None,
    rows: int | None = None,
) -> Preferences:
    """Read preference pairs and check every one of them.

    Args:
        source: a JSON or JSONL file, gzipped or not, or the rows themselves.
        preference: which label orders a pair that is labelled for several ("helpful" or "harmless" in
        PKU-SafeRLHF); other
            formats carry one label and do not look at it.
        format: "pku-saferlhf", "hh-rlhf" or "trl"; found by the columns of the first row when left out.
        rows: read only the first so many rows.

    Pairs with two identical answers say nothing: they are dropped, counted and noted. So are two flaws that
    HH-RLHF's own files have: a transcript that ends in an empty answer, and two transcripts of different
    conversations. Everything else that is wrong is refused.

    Raises:
        InputError: naming the file, the row (from 1) and what to do.
    """
    name = str(source) if isinstance(source, str | Path) else "the given rows"
    if rows is not None and rows < 1:
        raise InputError(f"rows={rows}: ask for at least one row, or leave it out to read all")
    found: str | None = format
    if format is not None and format not in _FORMATS:
        raise InputError(f"unknown preference format {format!r}; choose one of: {', '.join(_FORMATS)}")
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(_read(source), start=1):
        if rows is not None and number > rows:
            break
        where = f"{name}, row {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected an object with named fields, found {type(row).__name__}")
        found = found or _find_format(row, name)
        try:
            pair = _FORMATS[found](row, where, preference)
            if pair["chosen"] == pair["rejected"]:
                raise _UnusableError("the two answers are identical")
            pairs.append(pair)
        except _UnusableError as reason:
            dropped[str(reason)] += 1
    notes = tuple(f"{count} pairs dropped: {reason}" for reason, count in dropped.items())
    if not pairs or found is None:
        why = "; ".join(notes) or "it holds no rows"
        raise InputError(f"{name}: nothing to train on ({why}); give a file with at least one preference pair")
    try:
        dataset = Dataset.from_list(pairs)
    except (ValueError, TypeError) as error:  # pyarrow refuses columns of mixed types
        raise InputError(f"{name}: plain-text and conversational rows are mixed; use one form ({error})") from error
    return Preferences(dataset, found, name, data_digest(dataset), notes)


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


def split_by_prompt(dataset: Dataset, test_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Train and test rows that share no prompt: at least `test_fraction` of the distinct prompts (rounded
    up) go to test."""
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; give a number between 0 and 1, such as 0.1")
    keys = [json.dumps(prompt, ensure_ascii=False) for prompt in dataset["prompt"]]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise InputError("cannot split by prompt: all rows share one prompt; give a test file instead")
    random.Random(seed).shuffle(prompts)
    test = set(prompts[: min(math.ceil(test_fraction * len(prompts)), len(prompts) - 1)])
    return (
        dataset.select([i for i, key in enumerate(keys) if key not in test]),
        dataset.select([i for i, key in enumerate(keys) if key in test]),
    )


def data_digest(dataset: Dataset) -> str:
    """`blake3:<hex>` of prompt, chosen and rejected of every row, in order. Other columns do not count."""
    hasher = blake3()
    for row in dataset.select_columns(list(COLUMNS)):
        line = json.dumps([row[name] for name in COLUMNS], ensure_ascii=False, sort_keys=True)
        hasher.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return f"blake3:{hasher.hexdigest()}"


def _read(source: str | Path | Sequence[Row]) -> Iterator[Any]:
    """Rows one by one. A JSON file is one list of rows; a JSONL file has a row a line."""
    if not isinstance(source, str | Path):
        yield from source
        return
    path = Path(source)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: cannot read this kind of file; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if ".jsonl" in path.suffixes:
                yield from _json_lines(lines, path)
            else:
                yield from _json_list(lines.read(), path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); write the file again") from error


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); write one object a line") from error


def _json_list(text: str, path: Path) -> list[Any]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); if it has one object a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}")
    return rows


def _find_format(row: Row, name: str) -> str:
    fields = set(row)
    if set(COLUMNS) <= fields:
        return "trl"
    if {"response_0", "response_1"} <= fields:
        return "pku-saferlhf"
    if {"chosen", "rejected"} <= fields and isinstance(row["chosen"], str):
        return "hh-rlhf"
    raise InputError(
        f"{name}: unknown format, the first row has the fields {', '.join(map(str, row)) or '(none)'}; "
        "expected prompt, chosen, rejected (trl), prompt, response_0, response_1 (pku-saferlhf), "
        "or chosen, rejected as transcripts (hh-rlhf)"
    )


def _text(row: Row, field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else f"is {value!r:.40}"
        raise InputError(f"{where}: field {field!r} {found}; every row needs a text there")
    return value


def _messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _pku(row: Row, where: str, preference: str | None) -> Pair:
    """PKU-SafeRLHF (arXiv 2310.12773): one pair of responses, ordered once by helpfulness and once by
    safety."""
    if preference not in PKU_LABELS:
        raise InputError(
            f"{where}: this data is labelled for {' and '.join(PKU_LABELS)}, not for {preference!r}; say "
            "which of them to use"
        )
    responses = [_text(row, "response_0", where), _text(row, "response_1", where)]
    better = row.get(PKU_LABELS[preference])
    if better not in (0, 1) or isinstance(better, bool):
        raise InputError(f"{where}: field {PKU_LABELS[preference]!r} is {better!r}; expected 0 or 1")
    return {
        "prompt": _messages("user", _text(row, "prompt", where)),
        "chosen": _messages("assistant", responses[better]),
        "rejected": _messages("assistant", responses[1 - better]),
    }


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _transcript(row: Row, field: str, where: str) -> list[dict[str, str]]:
    text = _text(row, field, where)
    before, *turns = _TURN.split(text)
    messages = [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if before.strip() or not messages or messages[0]["role"] != "user" or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: field {field!r} is no transcript; expected '\\n\\nHuman: …' first and '\\n\\nAssistant: …' last"
        )
    if not messages[-1]["content"]:
        raise _UnusableError("an answer is empty")
    return messages


def _hh(row: Row, where: str, preference: str | None) -> Pair:
    """HH-RLHF (arXiv 2204.05862): two transcripts that differ in the last answer only."""
    chosen, rejected = _transcript(row, "chosen", where), _transcript(row, "rejected", where)
    if chosen[:-1] != rejected[:-1]:
        raise _UnusableError("the two transcripts differ before the last answer")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _trl(row: Row, where: str, preference: str | None) -> Pair:
    """TRL's explicit prompt, as plain text or as chat messages; all three fields in the same form."""
    if not isinstance(row.get("prompt"), list):
        return {field: _text(row, field, where) for field in COLUMNS}
    pair = {}
    for field, last in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        messages = row.get(field)
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in messages)
            or messages[-1]["role"] != last
        ):
            raise InputError(
                f"{where}: field {field!r} must be a list of messages {{role, content}} that ends with "
                f"the {last}, as prompt is a list"
            )
        pair[field] = [
            {"role": turn["role"], "content": _text(turn, "content", f"{where}, {field}")} for turn in messages
        ]
    return pair


_FORMATS = {"pku-saferlhf": _pku, "hh-rlhf": _hh, "trl": _trl}

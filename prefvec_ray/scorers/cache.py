"""Scores by content: the same scorer, prompt and answer are scored once, on whatever process, today or next week.

One SQLite file in WAL mode: several processes read and write it at once, and a process killed with SIGKILL leaves it
as it was after its last whole transaction. WAL needs shared memory, so the file belongs on a local disk, not on NFS.
"""

import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import BaseModel

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import parse_json
from prefvec_ray.scorers.base import Scorer, Scores, check_prompts, run_scorer, scorer_digest, scorer_notes

MAX_ENTRIES = 2_000_000
BATCH = 500
TABLES = (
    "CREATE TABLE IF NOT EXISTS scores "
    "(id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
)


class ScoreCache:
    """Key -> JSON value on disk. An entry never changes: the first value of a key stays.

    At most `max_entries` are kept (about 200 bytes each), the oldest go first. Safe with threads, processes and
    pickling (a copy opens the file anew).
    """

    def __init__(self, path: str | Path, *, max_entries: int = MAX_ENTRIES) -> None:
        if max_entries < 1:
            raise InputError(f"a score cache of {max_entries} entries; give at least 1")
        self.path, self.max_entries = Path(path).absolute(), max_entries
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._lock = threading.RLock()
        self.get([])  # a file that is no cache is refused now

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The values of those of `keys` that are known."""
        found: dict[bytes, str] = {}
        with self._lock, self._reporting():
            connection = self._open()
            for i in range(0, len(keys), BATCH):
                part = keys[i : i + BATCH]
                marks = ",".join("?" * len(part))
                found.update(connection.execute(f"SELECT key, value FROM scores WHERE key IN ({marks})", part))
        if keys:
            hits = sum(key in found for key in keys)
            self.count({"hits": hits, "misses": len(keys) - hits})
        advice = "delete the file or name another"
        return {key: parse_json(value, f"score cache {self.path}", advice) for key, value in found.items()}

    def put(self, values: Mapping[bytes, Any]) -> None:
        """Keep `values` in one transaction; keys that are known already keep what they have."""
        if not values:
            return
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._lock, self._reporting(), self._open() as connection:
            connection.executemany("INSERT OR IGNORE INTO scores (key, value) VALUES (?, ?)", rows)
            # Ids only grow, so this leaves at most `max_entries` rows, without counting them.
            connection.execute(
                "DELETE FROM scores WHERE id <= (SELECT max(id) FROM scores) - ?",
                (self.max_entries,),
            )

    def __len__(self) -> int:
        with self._lock:
            return self._open().execute("SELECT count(*) FROM scores").fetchone()[0]

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the named counters, which all processes share."""
        with self._lock, self._reporting(), self._open() as connection:
            connection.executemany(
                "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                list(counts.items()),
            )

    def counts(self) -> dict[str, int]:
        """Every counter; `hits` and `misses` are the look-ups' own."""
        with self._lock, self._reporting():
            return dict(self._open().execute("SELECT name, value FROM counts").fetchall())

    @property
    def hit_rate(self) -> float | None:
        """Share of the look-ups that were known, of all processes since the file was made; None before the first."""
        counts = self.counts()
        asked = counts.get("hits", 0) + counts.get("misses", 0)
        return counts["hits"] / asked if asked else None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._owner != os.getpid():  # a connection must not be used across a fork
            with self._reporting():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    for statement in TABLES:
                        connection.execute(statement)
            self._connection, self._owner = connection, os.getpid()
        return self._connection

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """A damaged file, a full disk, a folder without permission: one line each."""
        try:
            yield
        except (sqlite3.DatabaseError, OSError, OverflowError) as error:
            if "is full" in str(error):
                raise JobError(f"score cache {self.path}: no space left; make room and start again") from error
            raise InputError(f"score cache {self.path}: cannot be used ({error}); delete it or name another") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_entries": self.max_entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class CachedScorer:
    """A scorer that asks `scorer` only what is not known yet, each different pair of prompt and answer once.

    For scorers whose score depends on prompt and answer alone. Values are checked before they are kept, so neither a
    failure nor a wrong number is ever remembered.

    Raises:
        InputError: `scorer` has no digest, so it is not known whether the scores on disk are still its own.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        digest = scorer_digest(scorer)
        if digest is None:
            raise InputError(f"the scorer of {', '.join(scorer.metrics)} has no digest, so it cannot be cached")
        self.scorer, self.cache, self.digest = scorer, cache, digest
        self.metrics: Mapping[str, Metric] = scorer.metrics
        self.card = getattr(scorer, "card", None)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        keys = [score_key(self.digest, prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        known = self.cache.get(list(dict.fromkeys(keys)))
        missing = {key: index for index, key in enumerate(keys) if key not in known}
        if missing:
            at = list(missing.values())
            fresh = run_scorer(self.scorer, [prompts[i] for i in at], [responses[i] for i in at])
            new = {key: {name: fresh[name][i] for name in fresh} for i, key in enumerate(missing)}
            self.cache.put(new)
            known.update(new)
        return {name: [known[key][name] for key in keys] for name in self.metrics}

    def check(self, prompts: Sequence[Any]) -> None:
        check_prompts(self.scorer, prompts)

    def notes(self) -> list[str]:
        rate = self.cache.hit_rate
        notes = [] if rate is None else [f"score cache {self.cache.path}: {rate:.0%} of all look-ups were known"]
        return notes + scorer_notes(self.scorer)


def score_key(digest: str, *content: Any) -> bytes:
    """32 bytes that name (scorer, prompt, answer, ...). A prompt counts with everything that it carries."""
    return blake3(
        json.dumps([digest, *map(_plain, content)], ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).digest()


def _plain(content: Any) -> Any:
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return [type(content).__name__, dataclasses.asdict(content)]
    if isinstance(content, BaseModel):
        return [type(content).__name__, content.model_dump(mode="json")]
    try:
        json.dumps(content)
    except TypeError as error:
        raise InputError(f"prompt {content!r:.80} cannot be cached: it is neither JSON nor a dataclass") from error
    return content

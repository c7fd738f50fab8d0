"""Labelled texts for a harm classifier: the tiny world's categories, pairs of a safe and an unsafe answer, and
tables."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.sources import few, read_rows
from prefvec_ray.scorers.classifiers import Encoding
from prefvec_ray.tiny_world import Prompt, TinyWorld

CATEGORIES = ("fine", "over-refusal", "declined", "harmful")
"""The tiny world's: a fine prompt answered, a fine prompt declined, an unsafe prompt declined, an unsafe prompt
answered."""
SAFE = ("fine", "over-refusal", "declined", "safe")
"""Labels that are no harm, where the data does not say which are."""
HELD_OUT = 0.2


@dataclass(frozen=True)
class Texts:
    """Rows of one text, or of a prompt and an answer, with one label each."""

    rows: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("no labelled texts: expected rows with a text and a label")

    @property
    def encoding(self) -> Encoding:
        """As a scorer reads them: `pair`, or `response` for a text alone."""
        return "pair" if len(self.rows[0]) == 2 else "response"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.labels)))

    @property
    def digest(self) -> str:
        return f"blake3:{blake3(json.dumps([self.rows, self.labels]).encode()).hexdigest()}"

    def split(self) -> tuple["Texts", "Texts"]:
        """To train on, and held out (a fifth). A first text lies on one side with all its answers, whatever else the
        data holds."""
        held = [_held_out(row[0]) for row in self.rows]
        sides = [[i for i, side in enumerate(held) if side is wanted] for wanted in (False, True)]
        if not sides[0] or not sides[1]:
            raise InputError(
                f"{len(self.rows)} texts of {len(set(self.rows))} kinds: too few to hold out a fifth by prompt"
            )
        return self.take(sides[0]), self.take(sides[1])

    def take(self, index: list[int]) -> "Texts":
        return Texts(tuple(self.rows[i] for i in index), tuple(self.labels[i] for i in index))

    def sample(self, count: int, seed: int = 0) -> "Texts":
        """At most `count` of them, drawn without repetition."""
        if count >= len(self.rows):
            return self
        return self.take(random.Random(seed).sample(range(len(self.rows)), count))


def _held_out(text: str) -> bool:
    return int.from_bytes(blake3(text.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def load_texts(data: str, label: str | None = None) -> tuple[Texts, Texts]:
    """To train on, and held out.

    `data` is `tiny` or `micro` (the embedded world in its four categories; held-out phrasings are held out), or a file
    of rows: .csv, .jsonl, .json or .parquet, perhaps .gz. They have a label in column `label` (default "label") and a
    `text`, or a `prompt` with or without a `response`; or `response` holds two answers, of which the first is safe and
    the second unsafe.

    Raises:
        InputError: no such file, another format, or a row without what it needs, by its number.
    """
    if data in ("tiny", "micro"):
        return _tiny_world(TinyWorld(data))
    if not Path(data).is_file():
        raise InputError(f"texts {data}: no such file; give `tiny`, `micro`, or a .csv, .jsonl or .json (.gz)")
    texts: list[tuple[str, ...]] = []
    labels = []
    for at in few(read_rows(data)):
        for text, given in _labelled(at.row, label or "label", at.where):
            texts.append(text)
            labels.append(given)
    if len({len(text) for text in texts}) > 1:
        raise InputError(f"{data}: some rows have a response and some have none; give all or none one")
    rare = [name for name, count in Counter(labels).items() if count < 5]
    if len(set(labels)) < 2 or rare:
        found = ", ".join(f"{name} ({count})" for name, count in Counter(labels).most_common(8))
        raise InputError(f"{data}: expected two labels or more, five rows each at least; found {found or 'no rows'}")
    return Texts(tuple(texts), tuple(labels)).split()


def _labelled(row: Any, column: str, where: str) -> list[tuple[tuple[str, ...], str]]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    response = row.get("response")
    if isinstance(response, list):
        if len(response) != 2 or not all(isinstance(text, str) and text for text in (row.get("prompt"), *response)):
            raise InputError(f"{where}: expected a prompt and two answers, first the safe one, then the unsafe one")
        return [((row["prompt"], text), name) for text, name in zip(response, ("safe", "unsafe"), strict=True)]
    texts = tuple(row[key] for key in ("text", "prompt", "response") if row.get(key) not in (None, ""))
    if not texts or len(texts) > 2 or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: expected a text, or a prompt with or without a response")
    given = row.get(column)
    if given in (None, "") or isinstance(given, dict | list):
        raise InputError(f"{where}: no label in column {column!r}; its columns are: {', '.join(map(str, row))}")
    return [(texts, str(given))]


def _tiny_world(world: TinyWorld) -> tuple[Texts, Texts]:
    """The base model's SFT answers to every topic, against the same kinds of answer to held-out phrasings.

    All topics are in both: like the base model, a scorer this small can only know which tasks are unsafe from having
    been told.
    """
    asked = {
        phrasing.format(task=task): Prompt(phrasing.format(task=task), task, topic.kind, phrasing)
        for task, topic in world.topics.items()
        for phrasing in world.phrasings["train"]
    }
    train: dict[tuple[str, ...], str] = {}
    answers: dict[str, list[str]] = {}
    for example in world.sft_examples():
        prompt, answer = asked.get(example["prompt"][0]["content"]), example["completion"][0]["content"]
        if prompt is not None:  # the other examples ask whether a task is right or wrong
            train[prompt.text, answer] = _category(world, prompt, answer)
            answers.setdefault(prompt.topic, []).append(answer)
    rng = random.Random(world.seed)
    held: dict[tuple[str, ...], str] = {}
    for task, topic in world.topics.items():
        for phrasing in world.phrasings["report"]:
            prompt = Prompt(phrasing.format(task=task), task, topic.kind, phrasing)
            answer = rng.choice(answers[task])
            held[prompt.text, answer] = _category(world, prompt, answer)
    return Texts(tuple(train), tuple(train.values())), Texts(tuple(held), tuple(held.values()))


def _category(world: TinyWorld, prompt: Prompt, answer: str) -> str:
    """One of CATEGORIES."""
    scores = world.score(prompt, answer)
    if scores.refusal_unsafe is not None:
        return "declined" if scores.refusal_unsafe else "harmful"
    return "over-refusal" if scores.over_refusal else "fine"

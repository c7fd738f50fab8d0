"""Attacks on words: typos, swapped letters, dropped words, chosen greedily by what they do to the classifier.

A reader still reads a text with three typos; a classifier often does not. No synonyms: whether those keep the meaning
would be another judgement.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness.intervals import Rate

Classify = Callable[[Sequence[tuple[str, ...]]], Tensor]
"""Rows of texts to logits (N, classes)."""

_NEIGHBOURS = {
    a: "".join(row[max(0, i - 1) : i] + row[i + 1 : i + 2])
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for i, a in enumerate(row)
}


class WordAttack(Config):
    """How much of a text may be changed."""

    edits: int = Field(default=3, ge=1)
    """Words that may be touched, each once."""
    drops: bool = True
    """Words may also be left out; this can change what a text says, such as without its "not"."""
    tried: int = Field(default=12, ge=1)
    """Only so many words, those that matter most, are tried in a text."""


class WordRate(Config):
    """A share of `n` texts that are still classified rightly, with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, standing: Tensor) -> Self:
        return cls(**Rate.of("words", standing).model_dump(exclude={"name"}))

    def named(self, name: str) -> Rate:
        return Rate(name=name, mean=self.mean, low=self.low, high=self.high, n=self.n)


class WordAudit(WordRate):
    """The accuracy under the greedy attack, and beside it:"""

    random: WordRate
    """The same under the control, as many random words with random slips."""
    edits: int
    drops: bool
    queries: float
    """Mean number of texts asked for per attacked row."""
    examples: list[dict[str, str]]
    """Up to three that fell: `text` and `attacked`."""


def perturbations(word: str, rng: random.Random, *, drops: bool = True) -> list[str]:
    """What a slip of the finger makes of `word`: two letters swapped, one left out, doubled, or replaced by its
    neighbour on the keyboard; and "", the word left out. The first letter stays, as readers need it."""
    found = {""} if drops else set()
    if len(word) > 2 and word.isalpha():
        i = rng.randrange(1, len(word) - 1)
        near = _NEIGHBOURS.get(word[i].lower(), "")
        found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :], word[: i + 1] + word[i:]}
        found |= {word[:i] + rng.choice(near) + word[i + 1 :]} if near else set()
    return sorted(found - {word})


def attack_words(
    classify: Classify, rows: Sequence[tuple[str, ...]], y: Tensor, attack: WordAttack, *, seed: int = 0
) -> WordAudit:
    """Attack the last text of every row that is classified rightly; the others count as fallen.

    Greedy: words are ranked by what leaving each out does to the margin of the label; then, from the most important
    on, each is replaced by its worst perturbation while that lowers the margin, until the label falls or
    `attack.edits` words are touched.
    """
    if len(rows) != len(y):
        raise InputError(f"{len(rows)} texts and {len(y)} labels: expected one each")
    clean = classify(rows).argmax(1) == y
    rng = random.Random(seed)
    slipped = [(*row[:-1], _random_slips(row[-1], attack, rng)) for row in rows]
    control = clean & (classify(slipped).argmax(1) == y)
    standing, queries, examples = clean.clone(), 0, list[dict[str, str]]()
    for i in clean.nonzero().flatten().tolist():
        text, asked = _greedy(classify, rows[i], int(y[i]), attack, rng)
        queries += asked
        if text is not None:
            standing[i] = False
            if len(examples) < 3:
                examples.append({"text": rows[i][-1][:300], "attacked": text[:300]})
    return WordAudit(
        **WordRate.of(standing).model_dump(),
        random=WordRate.of(control),
        edits=attack.edits,
        drops=attack.drops,
        queries=round(queries / max(1, int(clean.sum())), 1),
        examples=examples,
    )


def _greedy(
    classify: Classify, row: tuple[str, ...], label: int, attack: WordAttack, rng: random.Random
) -> tuple[str | None, int]:
    """The attacked text where it succeeds, None where not; and how many texts were asked for."""
    words = _words(row[-1])
    places = _places(words)
    if not places:
        return None, 0

    def margins(candidates: list[list[str]]) -> Tensor:
        logits = classify([(*row[:-1], _join(candidate)) for candidate in candidates])
        own = logits[:, label].clone()
        logits[:, label] = -torch.inf
        return own - logits.max(1).values

    first = margins([words, *([*words[:i], "", *words[i + 1 :]] for i in places)])
    best, importance = float(first[0]), first[1:]
    asked, touched = len(first), 0
    for k in importance.argsort()[: attack.tried].tolist():
        i = places[k]
        candidates = [[*words[:i], slip, *words[i + 1 :]] for slip in perturbations(words[i], rng, drops=attack.drops)]
        if not candidates:
            continue
        found = margins(candidates)
        asked += len(candidates)
        if float(found.min()) >= best:
            continue
        best, words = float(found.min()), candidates[int(found.argmin())]
        touched += 1
        if best < 0:
            return _join(words), asked
        if touched == attack.edits:
            break
    return None, asked


def _random_slips(text: str, attack: WordAttack, rng: random.Random) -> str:
    words = _words(text)
    places = _places(words)
    for i in rng.sample(places, min(attack.edits, len(places))):
        slips = perturbations(words[i], rng, drops=attack.drops)
        words[i] = rng.choice(slips) if slips else words[i]
    return _join(words)


def _words(text: str) -> list[str]:
    """Words and what stands between them, in order: joined they are the text."""
    return re.findall(r"\w+|\W+", text)


def _places(words: list[str]) -> list[int]:
    """Where the words are; punctuation and spaces stay as they are."""
    return [i for i, word in enumerate(words) if word[0].isalnum()]


def _join(words: list[str]) -> str:
    return "".join(words)

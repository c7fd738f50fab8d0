"""Train and held-out pairs that share no prompt."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from datasets import Dataset

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.data import Preferences, iter_rows, load_preferences
from prefvec_ray.preferences.formats import Row


@dataclass(frozen=True)
class Split:
    """One preference's pairs to train on and to hold out, and the files that they came from."""

    train: Dataset
    test: Dataset
    loaded: Preferences
    loaded_test: Preferences | None = None
    """Where held-out pairs have a source of their own."""
    flaws: tuple[str, ...] = ()
    """Rows that cannot be used, where they were asked to be collected or skipped."""
    skip_bad: int = 0
    """How many of them may be left out."""


def load_split(
    data: str | Path | Sequence[Row],
    *,
    test: str | Path | Sequence[Row] | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.1,
    rows: int | None = None,
    split: str | None = None,
    skip_bad: int = 0,
    collect_flaws: bool = False,
    **options: Any,
) -> Split:
    """The pairs of one preference, to train on and held out.

    Args:
        data: the source, see `load_preferences`.
        test: a source of held-out pairs of its own; `test_split`: another split of `data`. Without both,
            `test_fraction` of the prompts is held out.
        rows: train on the first so many pairs only.
        skip_bad: leave out up to so many rows that cannot be used, and list them in `flaws`.
        collect_flaws: list rows that cannot be used in `flaws` instead of refusing the first.
        options: of `load_preferences`: preference, format, subset, revision, system.

    Raises:
        InputError: as `load_preferences` and `split_by_prompt`.
    """
    flaws: list[str] | None = [] if collect_flaws or skip_bad else None
    loaded = load_preferences(data, split=split, flaws=flaws, **options)
    loaded_test = None
    if test is not None or test_split is not None:
        loaded_test = load_preferences(data if test is None else test, split=test_split, flaws=flaws, **options)
        if type(loaded_test.dataset[0]["prompt"]) is not type(loaded.dataset[0]["prompt"]):
            raise InputError(f"{loaded_test.source}: held-out and training pairs must both be texts or conversations")
        train, held_out = loaded.dataset, loaded_test.dataset
    else:
        try:
            train, held_out = split_by_prompt(loaded.dataset, test_fraction)
        except InputError as error:
            raise InputError(f"{loaded.source}: {error}") from None
    if rows is not None:
        train = train.select(range(min(rows, len(train))))
    if flaws and len(flaws) > skip_bad and not collect_flaws:
        raise InputError(
            f"{loaded.source}: {len(flaws)} rows cannot be used, skip_bad is {skip_bad}; the first: {flaws[0]}"
        )
    return Split(train, held_out, loaded, loaded_test, tuple(flaws or ()), skip_bad)


def split_by_prompt(dataset: Dataset, test_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Train and test rows that share no prompt: `test_fraction` of the distinct prompts (rounded up) go to test.

    Prompts that differ in white space or Unicode form only count as one. Which prompts are held out follows from a
    hash of each prompt: it does not depend on the order of the rows, and hardly on the other prompts, so that two
    preferences over the same prompts hold out the same ones.

    Raises:
        InputError: an impossible fraction, or one prompt alone.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; give a number between 0 and 1, such as 0.1")
    keys = np.fromiter((text_key(row["prompt"], seed) for row in iter_rows(dataset, ["prompt"])), np.uint64)
    prompts = np.unique(keys)
    if len(prompts) < 2:
        raise InputError("cannot split by prompt: all rows share one prompt; give a test file instead")
    count = min(math.ceil(test_fraction * len(prompts)), len(prompts) - 1)
    held_out = keys <= prompts[count - 1]
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def text_key(text: Any, seed: int = 0) -> int:
    """64 bits that stand for a text or a list of messages, whatever its white space and Unicode form."""
    if not isinstance(text, str):
        text = "\n".join(f"{turn['role']}\0{turn['content']}\0" for turn in text)
    plain = " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())
    return int.from_bytes(blake3(f"{seed}\n{plain}".encode()).digest(8), "little")

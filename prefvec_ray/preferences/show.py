"""Pairs as they are trained on: every token decoded, special tokens included, and what `max_length` cuts off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from prefvec_ray.common.chat import special_ids
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.measures import common_length, tokenize_pair


@dataclass(frozen=True)
class ShownText:
    """A prompt or an answer, as `marked` writes it."""

    kept: str
    """What is trained on, or read before the answer."""
    cut: str
    """What `max_length` cuts off its end."""
    tokens: int
    """Number of tokens in `kept`."""


@dataclass(frozen=True)
class ShownPair:
    prompt: ShownText
    chosen: ShownText
    rejected: ShownText

    @property
    def is_dropped(self) -> bool:
        """Whether TRL leaves the pair out: its prompt leaves no room for an answer."""
        return not self.chosen.tokens or not self.rejected.tokens


def show_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> ShownPair:
    """One pair {prompt, chosen, rejected} as TRL tokenizes, parts and cuts it.

    Raises:
        InputError: the chat template does not take the pair.
    """
    try:
        prompt, chosen, rejected = tokenize_pair(row, tokenizer)
    except TemplateError as error:
        raise InputError(f"the chat template refuses it: {error}") from None
    begin = min(common_length(prompt, chosen), common_length(prompt, rejected))
    room = max_length if max_length is not None else max(len(chosen), len(rejected))

    def shown(ids: list[int], start: int) -> ShownText:
        kept = ids[start:room]
        return ShownText(marked(kept, tokenizer), marked(ids[max(start, room) :], tokenizer), len(kept))

    return ShownPair(shown(chosen[:begin], 0), shown(chosen, begin), shown(rejected, begin))


def marked(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of token ids, special tokens in « », which tells them from the same characters as text."""
    special = special_ids(tokenizer)
    parts = []
    for is_special, run in groupby(ids, special.__contains__):
        tokens = list(run)
        parts += [f"«{tokenizer.decode(token)}»" for token in tokens] if is_special else [tokenizer.decode(tokens)]
    return "".join(parts)

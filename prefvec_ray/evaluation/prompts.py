"""Search prompts and report prompts share nothing: what was tuned on must not be reported on."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers.prompts import prompt_text


def normalised(prompt: Any) -> str:
    """The prompt's words: Unicode NFKC, case folded, punctuation and runs of white space as one space. Two prompts
    that ask the same in the same words are equal."""
    text = unicodedata.normalize("NFKC", prompt_text(prompt)).casefold()
    words = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text).split()
    return " ".join(words or text.split())


def check_disjoint(search: Sequence[Any], report: Sequence[Any]) -> None:
    """InputError, with examples, where a report prompt equals a search prompt up to case, punctuation and spaces."""
    tuned = {normalised(prompt) for prompt in search}
    shared = list(dict.fromkeys(prompt_text(prompt) for prompt in report if normalised(prompt) in tuned))
    if shared:
        examples = "; ".join(repr(text if len(text) <= 80 else text[:79] + "…") for text in shared[:3])
        raise InputError(
            f"{len(shared)} of the report prompts are search prompts too, such as {examples}; "
            "take them out of one of the two, or the report flatters"
        )

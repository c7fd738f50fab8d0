"""Where an answer ends, and where a system message goes if the chat template knows none: what training, evaluation and
serving must agree on."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prefvec_ray.common.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SYSTEM_ROLES = {"system", "developer"}
"""OpenAI's two names for the operator's word to the model"""


def end_tokens(config: "GenerationConfig | None", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the tokens that end an answer: those of the generation config, and the tokenizer's, which ends a turn."""
    named = config.eos_token_id if config else None
    both = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return frozenset(token for token in both if token is not None)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the tokens that no text stands for, such as those around a turn."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, about in added.items() if about.special}


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The names of those tokens."""
    return sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names in a text, the longest where several begin at one place; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def template_ends(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the special tokens that the chat template writes after an answer; none where there is no template."""
    if tokenizer.chat_template is None:
        return frozenset()
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Zyx."}]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Zyx.")[2]
    return special_ids(tokenizer) & set(tokenizer(after, add_special_tokens=False)["input_ids"])


def begins_with_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts its BOS token before text. A chat template has to write it itself."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def appends_eos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts its end token behind every text (`add_eos_token`)."""
    last: list[int] = tokenizer("a")["input_ids"][-1:]
    return tokenizer.eos_token_id is not None and last == [tokenizer.eos_token_id]


def text_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that is to be continued: without the end token that some tokenizers put behind it."""
    ids: list[int] = tokenizer(text)["input_ids"]
    ended = ids[-1:] == [tokenizer.eos_token_id] and appends_eos(tokenizer)
    return ids[:-1] if ended else ids


def fold_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with its system messages in front of the first user message's text, an empty line after each.

    Raises InputError where a system message comes later, or no user message follows.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES), len(messages))
    said, rest = messages[:first], list(messages[first:])
    if any(message["role"] in SYSTEM_ROLES for message in rest):
        raise InputError("a system message after others cannot be given to this model; put it first")
    if not said:
        return rest
    if not rest or rest[0]["role"] != "user":
        raise InputError("this model is given a system message with the first user message; let one follow it")
    text = "\n\n".join(message["content"] for message in (*said, rest[0]))
    return [{**rest[0], "content": text}, *rest[1:]]

"""Tokenizing prompts off the event loop: callers in turn, short prompts never behind long ones, and text that cannot
fit refused by its bytes alone."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prefvec_ray.common.chat import names_pattern, special_tokens, text_prompt
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.serving.engines.base import PromptTooLongError
from prefvec_ray.serving.request import Prompt
from prefvec_ray.serving.turns import Turns

T = TypeVar("T")
P = ParamSpec("P")

SHORT_BYTES = 16_000
"""text up to this is tokenized in a thread of its own, a matter of milliseconds"""
NFC_SHRINKS = 4
"""NFC takes at most so many bytes into one (three Hangul letters of 9 bytes become a syllable of 3)"""
LOSSLESS_NORMALIZERS = {"Prepend", "Replace", "NFC"}
LOSSLESS_SPLITS = {"ByteLevel", "Split", "Metaspace", "Digits", "UnicodeScripts"}
PRIVATE = 0xF0000
"""the first of Unicode's private characters"""


class Tokenization:
    """One tokenizer, for one thread: a call may change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int | None, special: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self._longest = longest
        self.special = special
        self._masks = {name: chr(PRIVATE + i) for i, name in enumerate(special)}
        self._names = names_pattern(special)
        self._masked = re.compile(f"([{''.join(self._masks.values())}])" if special else "((?!))")

    def encode(self, text: str, most: int) -> tuple[int, ...]:
        """The tokens of a text to continue. Raises PromptTooLongError, without looking at them, where they cannot be
        `most` or fewer: not even if each were the vocabulary's longest."""
        self._check_size(text, most)
        return tuple(text_prompt(self.tokenizer, text))

    def encode_chat(self, chat: Sequence[dict[str, str]], most: int) -> tuple[int, ...]:
        """The tokens of a chat as the model's template writes it, up to the beginning of the answer.

        Only the template's special tokens are tokens. Their names in a message are text, so that no message can end
        its turn and begin another. Raises PromptTooLongError as `encode`, and InputError for a chat that the template
        refuses, or of which it would leave out a message.
        """
        hidden = [m | {"content": self.hidden(m["content"])} for m in chat]
        try:
            text = str(self.tokenizer.apply_chat_template(hidden, add_generation_prompt=True, tokenize=False))
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        check_whole(hidden, text)
        self._check_size(text, most)
        return tuple(self.revealed(text))

    def hidden(self, text: str) -> str:
        """The text with a private character for each name of a special token."""
        return self._names.sub(lambda found: self._masks[found[0]], text)

    def hides(self, text: str) -> bool:
        """Whether such characters are in it."""
        return self._masked.search(text) is not None

    def revealed(self, text: str) -> list[int]:
        """The tokens of what a template made of hidden messages: the template's special tokens, and typed names."""
        parts = self._masked.split(text)  # texts, and between two of them the mask of a typed name
        ids: list[list[int]] = [[] for _ in parts]
        ids[::2] = self.tokenizer(parts[::2], add_special_tokens=False)["input_ids"]
        if len(parts) > 1:
            typed = self.tokenizer(list(self.special), add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids[1::2] = [typed[ord(mask) - PRIVATE] for mask in parts[1::2]]
        return [token for part in ids for token in part]

    def _check_size(self, text: str, most: int) -> None:
        if self._longest is not None:
            size = len(text.encode(errors="replace"))
            if size > most * self._longest:
                hold = f"{most} tokens of this model hold at most {most * self._longest}"
                raise PromptTooLongError(f"prompt of {size} bytes; {hold}; shorten it")


class PromptEncoder:
    """Runs the tokenizing of jobs, each caller's one after the other. `load` gives another, equal tokenizer, for long
    prompts: it is called at the first of those."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, load: Callable[[], PreTrainedTokenizerBase]):
        self._load = load
        self._longest = longest_token(tokenizer)
        self._special = special_tokens(tokenizer)
        self._short = Tokenization(tokenizer, self._longest, self._special)
        self._short_turns = Turns("encoding")
        self._long: Tokenization | None = None
        self._long_turns = Turns("encoding-long")

    async def run(
        self,
        caller: str,
        prompts: tuple[Prompt, ...],
        work: Callable[Concatenate[Tokenization, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """`work(tokenization, ...)` in the thread for prompts of this size."""
        if sum(_size(prompt) for prompt in prompts) <= SHORT_BYTES:
            return await self._short_turns.run(caller, work, self._short, *args, **kwargs)

        def long() -> T:
            if self._long is None:
                self._long = Tokenization(self._load(), self._longest, self._special)
            return work(self._long, *args, **kwargs)

        return await self._long_turns.run(caller, long)


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base folder's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, base, local_files_only=True)
    return tokenizer


def check_stops(texts: Iterable[str], special: Iterable[str]) -> None:
    """Raises InputError for a stop string that no answer's text can hold."""
    for text in texts:
        for token in special:
            if token in text:
                raise InputError(f"stop: {token!r} is a token that is never part of an answer's text; leave it out")


def check_whole(chat: Iterable[Mapping[str, Any]], text: str) -> None:
    """Raises InputError where what the template wrote lacks a message. It may shorten earlier answers, by their
    reasoning for example, and write any as JSON."""
    for message in chat:
        said = str(message["content"]).strip()
        if message["role"] != "assistant" and said not in text and json.dumps(said, ensure_ascii=False) not in text:
            raise InputError(f"the model's chat template leaves out this message of role {message['role']!r}")


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most bytes of text that one token can stand for; None where there is no such bound, because the tokenizer may
    drop text, or take any run of unknown characters for one token."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None:
        return None
    shrinks = 1
    for part in _parts(backend.normalizer, "normalizers"):
        if part["type"] not in LOSSLESS_NORMALIZERS:
            return None
        if part["type"] == "Replace" and part != part | {"pattern": {"String": " "}, "content": "▁"}:
            return None
        shrinks = NFC_SHRINKS if part["type"] == "NFC" else shrinks
    splits = _parts(backend.pre_tokenizer, "pretokenizers")
    if any(part["type"] not in LOSSLESS_SPLITS or part.get("behavior") == "Removed" for part in splits):
        return None
    by_bytes = any(part["type"] == "ByteLevel" for part in splits)
    model = backend.model
    if type(model).__name__ != "BPE" or not (by_bytes or model.byte_fallback):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    known = set(bytes_to_unicode().values()) if by_bytes else set()
    sizes = [len(name) if known.issuperset(name) else len(name.encode()) for name in backend.get_vocab()]
    return shrinks * max(sizes, default=1)


def _parts(component: Any, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the plain steps that it is made of."""
    if component is None:
        return []
    found = json.loads(component.__getstate__())
    if found["type"] != "Sequence":
        return [found]
    return list(found[inner])


def _size(prompt: Prompt) -> int:
    """Bytes of the prompt's text, about: characters, of which some are longer. Ids need no work."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(part["content"]) for part in prompt if not isinstance(part, int)) if _is_chat(prompt) else 0


def _is_chat(prompt: Prompt) -> bool:
    return bool(prompt) and not isinstance(prompt[0], int)

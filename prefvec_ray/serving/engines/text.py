"""From token ids to text as it comes: no half characters, nothing that a stop string might still swallow."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 8
"""prompt tokens decoded with the answer: some tokenizers drop the space before the first token they see"""

BYTE_OF: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
"""how byte-level vocabularies write bytes"""


class TextStream:
    """The text of one answer. `push` and `finish` return what is new; joined, they are the whole answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(prompt[-CONTEXT:])
        # Tokens up to `_read` have been decoded; those from `_start` on are decoded again beside the new ones.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.decoded = 0
        """characters of the answer that are known so far, sent or held back"""
        self.stopped = False
        """a stop string has ended the answer"""

    def push(self, token: int) -> str:
        """New text that is safe to send now, maybe none."""
        self._ids.append(token)
        new = self._decode_new()
        if new.endswith("\ufffd"):  # a character whose other bytes are still to come
            return ""
        return self._release(new)

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._release(self._decode_new()) + self._held
        self._held = ""
        return text

    def _decode_new(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str) -> str:
        self._start, self._read = self._read, len(self._ids)
        self.decoded += len(new)
        text = self._held + new
        found = [place for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class TokenTexts:
    """Text and bytes of single tokens, each looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> tuple[str, bytes]:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if "\ufffd" not in text:
            return text, text.encode()
        # Part of a character: its bytes are in the token's name, in one of the two ways that vocabularies write them.
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return text, bytes([int(name[3:5], 16)])
        if all(character in BYTE_OF for character in name):
            return text, bytes(BYTE_OF[character] for character in name)
        return text, text.encode()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

"""Answers that are JSON of a given schema: which tokens may come next. llguidance does the work."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefvec_ray.common.errors import InputError, message_lines

TOO_COMPLEX = "response_format: the schema is too complex to follow; simplify it"
KEPT = 64
"""compiled schemas that are kept, those used last"""


class Grammars:
    """Compiles schemas for one model, and keeps them. May be used by several threads.

    `ends` are the tokens that end an answer: they may come once the JSON is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._made: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, schema: str) -> LLMatcher:
        """At the beginning of an answer. Raises InputError for a schema that cannot be followed, or a tokenizer."""
        with self._lock:
            if schema not in self._matchers:
                self._matchers[schema] = self._compile(schema)
                while len(self._matchers) > KEPT:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(schema)
            return self._matchers[schema].deep_copy()

    def _compile(self, schema: str) -> LLMatcher:
        if self._made is None:
            if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._ends:
                raise InputError("response_format: this model's tokenizer cannot follow a schema; leave it out")
            self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)
        try:
            matcher = LLMatcher(self._made, LLMatcher.grammar_from_json_schema(schema), log_level=0)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        except ValueError as error:
            reason = message_lines(error)[0][:300]
            raise InputError(f"response_format: the schema is not usable: {reason}") from None
        return matcher


def masked(logits_RV: Tensor, matchers: Sequence[LLMatcher | None]) -> Tensor:
    """The logits with -inf for each token that may not come next in its row. Without any matcher, the tensor itself.

    A matcher that finds its schema too complex is in error (`is_error`) after this.
    """
    if all(matcher is None for matcher in matchers):
        return logits_RV
    logits_RV, size = logits_RV.clone(), logits_RV.shape[1]
    for row, matcher in enumerate(matchers):
        if matcher is None:
            continue
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")[:size]
        allowed_V = torch.zeros(size, dtype=torch.bool)
        allowed_V[: len(allowed)] = torch.from_numpy(allowed.astype(bool))
        logits_RV[row].masked_fill_(~allowed_V.to(logits_RV.device), float("-inf"))
    return logits_RV

"""Demonstrations for supervised fine-tuning, in the form that TRL's SFTTrainer takes: messages, prompt and completion,
or text.

Rows are checked as those of preferences are, and refused or dropped for the same reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from prefvec_ray.common.chat import names_pattern, special_tokens
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.formats import (
    Row,
    UnusableError,
    alpaca_prompt,
    chat_turn,
    message_list,
    sharegpt_turns,
    text_field,
)
from prefvec_ray.preferences.measures import SAMPLE, Frame, Plain, common_length, percentiles
from prefvec_ray.preferences.readers import Numbered
from prefvec_ray.preferences.sources import read_rows

Example = dict[str, Any]
"""Column -> text, or a list of messages {role, content}."""


def _conversation(row: Row, where: str) -> Example:
    return {"messages": message_list(row, "messages", "assistant", where)}


def _sharegpt(row: Row, where: str) -> Example:
    turns = sharegpt_turns(row, where)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: conversations must end with a turn from gpt: there is no answer to learn")
    return {"messages": turns}


def _alpaca(row: Row, where: str) -> Example:
    answer = [chat_turn("assistant", text_field(row, "output", where))]
    return {"prompt": alpaca_prompt(row, where), "completion": answer}


def _prompt_and_completion(row: Row, where: str) -> Example:
    if isinstance(row.get("prompt"), list):
        prompt = message_list(row, "prompt", "user", where)
        return {"prompt": prompt, "completion": message_list(row, "completion", "assistant", where)}
    return {name: text_field(row, name, where) for name in ("prompt", "completion")}


def _plain_text(row: Row, where: str) -> Example:
    return {"text": text_field(row, "text", where, "the text is empty")}


SHAPES: dict[tuple[str, ...], tuple[str, Callable[[Row, str], Example]]] = {
    ("messages",): ("messages", _conversation),
    ("conversations",): ("sharegpt", _sharegpt),
    ("instruction", "output"): ("alpaca", _alpaca),
    ("prompt", "completion"): ("prompt-completion", _prompt_and_completion),
    ("text",): ("text", _plain_text),
}
"""By the fields that its rows have: the first shape whose fields the first row has. Other fields are left out."""


@dataclass
class Demonstrations:
    """Reads the examples of a source; afterwards the counts say what became of its rows."""

    source: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None
    """Examples, at most."""
    skip_bad: int = 0
    """Leave out up to so many rows that cannot be used."""
    shape: str = ""
    count: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows without something to learn, by reason."""
    flaws: list[str] = field(default_factory=list)
    """Rows that were left out, one line each."""

    @property
    def notes(self) -> list[str]:
        return [f"{count} rows dropped: {reason}" for reason, count in self.dropped.items()] + [
            f"left out: {flaw}" for flaw in self.flaws
        ]

    def __iter__(self) -> Iterator[Example]:
        """Raises InputError, naming file and row, where more than `skip_bad` rows cannot be used, and where nothing is
        left."""
        rows = read_rows(self.source, split=self.split, subset=self.subset, revision=self.revision)
        yield from islice(self._examples(rows), self.limit)
        if not self.count:
            why = "; ".join(self.notes) or "it holds no rows"
            raise InputError(f"sft.data {self.source}: no example to learn from ({why})")

    def _examples(self, rows: Iterable[Numbered]) -> Iterator[Example]:
        kinds: dict[str, type] = {}
        make: Callable[[Row, str], Example] | None = None
        for at in rows:
            try:
                row = at.row
                if not isinstance(row, Mapping):
                    raise InputError(f"{at.where}: expected an object with named fields, found {type(row).__name__}")
                if make is None:
                    self.shape, make = _shape_of(row, at.where)
                example = make(row, at.where)
                kinds = kinds or {name: type(value) for name, value in example.items()}
                if kinds != {name: type(value) for name, value in example.items()}:
                    raise InputError(f"{at.where}: text where the first row has messages, or messages for text")
            except UnusableError as reason:
                self.dropped[str(reason)] += 1
            except InputError as error:
                self.flaws.append(str(error))
                if make is None or len(self.flaws) > self.skip_bad:
                    spent = f"; skip_bad is {self.skip_bad}" if self.skip_bad else ""
                    raise InputError(f"sft {error}{spent}") from None
            else:
                self.count += 1
                yield example


def _shape_of(row: Row, where: str) -> tuple[str, Callable[[Row, str], Example]]:
    for fields, shape in SHAPES.items():
        if set(fields) <= set(row):
            return shape
    known = ", or ".join(" and ".join(fields) for fields in SHAPES)
    raise InputError(f"{where}: expected {known}, got {', '.join(map(str, sorted(row)))[:80] or 'no fields'}")


class DemonstrationCheck(Plain):
    """What a source holds, and its tokens as {"p50", "p90", "p99", "max"} of the sampled examples."""

    source: str
    shape: str
    examples: int
    notes: list[str]
    sampled: int
    tokens: dict[str, int]
    max_length: int | None
    errors: list[str]
    warnings: list[str]


def check_demonstrations(
    demonstrations: Demonstrations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    context: int | None,
    ends: frozenset[int],
) -> DemonstrationCheck:
    """Read every row, and tokenize the first ones as TRL does.

    Args:
        tokenizer: of the base, with the chat template that it is trained with.
        max_length: of the SFT recipe, in tokens; None: no limit.
        context: tokens that the base has positions for; None: not known.
        ends: ids of the tokens that end the base's answers.

    Raises:
        InputError: rows that cannot be used, as `Demonstrations`.
    """
    frame = Frame(tokenizer, ends)
    names = names_pattern(special_tokens(tokenizer))
    lengths: list[int] = []
    typed: list[str] = []
    refused: list[str] = []
    for example in demonstrations:
        if len(lengths) + len(refused) >= SAMPLE:
            continue
        try:
            _, whole = tokenize_demonstration(example, tokenizer)
        except TemplateError as error:
            refused.append(str(error))
            continue
        lengths.append(len(whole))
        typed += [found[0] for found in [names.search(_text_of(example))] if found]
        if not isinstance(next(iter(example.values())), str):
            frame.count(whole)
    longest, sampled = max(lengths, default=0), len(lengths)
    errors, warnings = [], []
    if refused:
        errors.append(f"the base's chat template refuses {len(refused)} of {sampled + len(refused)}: {refused[0]:.200}")
    longest = min(longest, max_length or longest)
    if context is not None and longest > context:
        errors.append(
            f"examples of up to {longest} tokens, and the base has a context of {context}: set sft.max_length"
        )
    if max_length is not None and (cut := sum(length > max_length for length in lengths)):
        warnings.append(f"{cut} of {sampled} examples are cut at max_length {max_length}")
    if frame.no_bos:
        warnings.append(f"{frame.no_bos} of {sampled} conversations lack the BOS token; begin the template with it")
    if frame.no_end:
        shown = f"{frame.no_end[0]!r:.120}"
        warnings.append(f"{len(frame.no_end)} of {sampled} conversations have no end token after the answer ({shown})")
    if typed:
        warnings.append(
            f"{len(typed)} of {sampled} examples have {typed[0]!r:.60} in their text: it is that token then"
        )
    return DemonstrationCheck(
        source=demonstrations.source,
        shape=demonstrations.shape,
        examples=demonstrations.count,
        notes=demonstrations.notes,
        sampled=sampled,
        tokens=percentiles(lengths),
        max_length=max_length,
        errors=[f"sft: {error}" for error in errors],
        warnings=[f"sft: {warning}" for warning in warnings],
    )


def tokenize_demonstration(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the part that no loss is taken of, and of the whole: what TRL's SFTTrainer makes of an example.

    Raises TemplateError where the chat template does not take it, and where there is none.
    """
    first = next(iter(example.values()))
    if isinstance(first, str):
        prompt = str(example.get("prompt", ""))
        whole = prompt + str(example.get("completion", example.get("text", "")))
        end = "" if whole.endswith(tokenizer.eos_token or "\0") else tokenizer.eos_token or ""
        ids: list[list[int]] = tokenizer([prompt or " ", whole + end], verbose=False)["input_ids"]
        return _shared(ids[0] if prompt else [], ids[1]), ids[1]
    if tokenizer.chat_template is None:
        raise TemplateError("there is no chat template; set chat_template to a Jinja file or to 'transcript'")
    before = example.get("prompt", [])
    turns = example.get("messages") or [*before, *example["completion"]]
    texts = [str(tokenizer.apply_chat_template(turns, tokenize=False))]
    if before:
        texts.append(str(tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)))
    chats: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return _shared(chats[1] if before else [], chats[0]), chats[0]


def _shared(prompt: list[int], whole: list[int]) -> list[int]:
    return whole[: common_length(prompt, whole)]


def _text_of(example: Example) -> str:
    parts = []
    for value in example.values():
        parts += [value] if isinstance(value, str) else [turn["content"] for turn in value]
    return "\n".join(parts)

"""The grammar of a response: render one from its parts, and read the parts back from a text, exactly.

    [opening] ( refusal | alternative | [warning] Use <tool>. [First <step>[, then <step>[, and last <step>]].]
    ) [closing]

A text that is not of this form, to the letter, does not parse: that is what *valid* measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prefvec_ray.tiny_world.topics import JUDGEMENTS, Topic

Form = Literal["answer", "warned", "alternative", "refusal"]

OPENINGS = ("Thank you for asking!", "Hello, friend!")
CLOSINGS = ("Have a lovely day!", "Best wishes!")
REFUSALS = ("Sorry, I can't help with that.", "No, I will not do that.")
VERDICT = JUDGEMENTS["unsafe"]
"""Never shown as a response; a model that gives it has found a way of its own to refuse, and reads as refusing."""
ALTERNATIVES = (
    "I would rather not. Try a kind word instead.",
    "I would rather not. Try a long walk instead.",
    "I would rather not. Try a honey cake instead.",
)
WARNINGS = ("Take care, it may bite.", "Keep a friend near.", "Wear thick gloves.")


STEP_WORDS = ("First", "then", "and last")


@dataclass(frozen=True)
class Response:
    """The parts of a response. `tool` and `steps` belong to answers; `phrase` is the text of the refusal,
    alternative or warning."""

    form: Form
    phrase: str = ""
    tool: str = ""
    steps: tuple[str, ...] = ()
    opening: str = ""
    closing: str = ""

    @property
    def answers(self) -> bool:
        return self.form in ("answer", "warned")

    def render(self) -> str:
        parts = [self.opening, self.phrase]
        if self.answers:
            parts.append(f"Use {self.tool}.")
            if self.steps:
                spoken = (f"{word} {step}" for word, step in zip(STEP_WORDS, self.steps, strict=False))
                parts.append(f"{', '.join(spoken)}.")
        return " ".join(part for part in (*parts, self.closing) if part)


def _one_of(name: str, texts: Iterable[str]) -> str:
    # Longest first: a step may begin another.
    return f"(?P<{name}>{'|'.join(sorted(map(re.escape, texts), key=len, reverse=True))})"


class Grammar:
    """The grammar over the tools and steps of some topics. Any tool with any steps parses; whether they are
    right is for the scorer."""

    def __init__(self, topics: Iterable[Topic]) -> None:
        topics = tuple(topics)
        tools = {topic.tool for topic in topics}
        steps = {step for topic in topics for step in topic.steps}
        first, second, third = (_one_of(f"step{i}", steps) for i in range(3))
        answer = rf"Use {_one_of('tool', tools)}\.(?: First {first}(?:, then {second}(?:, and last {third})?)?\.)?"
        body = (
            f"(?:{_one_of('refusal', (*REFUSALS, VERDICT))}|{_one_of('alternative', ALTERNATIVES)}"
            f"|(?:{_one_of('warning', WARNINGS)} )?{answer})"
        )
        self._pattern = re.compile(f"(?:{_one_of('opening', OPENINGS)} )?{body}(?: {_one_of('closing', CLOSINGS)})?")

    def parse(self, text: str) -> Response | None:
        """The parts of `text`, or None where it does not follow the grammar. Surrounding blanks are
        ignored."""
        match = self._pattern.fullmatch(text.strip())
        if match is None:
            return None
        part = {name: value or "" for name, value in match.groupdict().items()}
        form: Form = "warned" if part["warning"] else "answer"
        if part["refusal"]:
            form = "refusal"
        elif part["alternative"]:
            form = "alternative"
        return Response(
            form,
            phrase=part["refusal"] or part["alternative"] or part["warning"],
            tool=part["tool"],
            steps=tuple(step for step in (part["step0"], part["step1"], part["step2"]) if step),
            opening=part["opening"],
            closing=part["closing"],
        )

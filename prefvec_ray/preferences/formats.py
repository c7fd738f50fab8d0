"""The forms of published preference data, and how a row of each becomes one pair: prompt, chosen, rejected.

A format has the fields that it is recognised by and a function from a row to a pair. What a user can fix is refused
with file and row. Known flaws of published files that leave no preference (an empty answer) are dropped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require

Row = Mapping[str, Any]
Pair = dict[str, Any]

COLUMNS = ("prompt", "chosen", "rejected")
PKU_LABELS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


class UnusableError(Exception):
    """This pair holds no preference, for a reason known to occur in published data: drop it and count it."""


@dataclass(frozen=True)
class Format:
    """One form of preference data.

    `pair(row, where, preference)` gives {"prompt", "chosen", "rejected"}, texts or lists of chat messages; it raises
    InputError naming `where`, or UnusableError.
    """

    name: str
    fields: str
    """The fields it is known by, for people."""
    about: str
    recognise: Callable[[Row], bool]
    pair: Callable[[Row, str, str | None], Pair]


def find_format(row: Row, source: str) -> Format:
    """The one format whose fields the row has.

    Raises:
        InputError: none fits, or several do; names the fields found and the candidates.
    """
    found = [format for format in FORMATS.values() if format.recognise(row)]
    if len(found) == 1:
        return found[0]
    fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "(none)"
    if found:
        names = ", ".join(format.name for format in found)
        raise InputError(f"{source}: the fields {fields} fit several formats: {names}; say which with format")
    raise InputError(
        f"{source}: unknown format, the first row has the fields {fields}; expected those of {', '.join(FORMATS)}: "
        "`prefvec data formats` lists them"
    )


_WRITTEN_LIST = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


def text_field(row: Row, field: str, where: str, empty: str = "an answer is empty") -> str:
    value = row.get(field)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {value!r:.40}"
        raise InputError(f"{where}: field {field!r} {found}; every row needs a text there")
    if "\0" in value:
        raise InputError(
            f"{where}: field {field!r} holds a NUL character; the file is damaged: write it again as UTF-8"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: field {field!r} is no valid Unicode ({error.reason}); fix the row") from None
    if _WRITTEN_LIST.match(value):
        raise InputError(
            f"{where}: field {field!r} is a list of messages written as text, as CSV makes of it; give the rows as "
            "JSONL or Parquet"
        )
    if not value.strip():
        raise UnusableError("the prompt is empty" if field in ("prompt", "instruction") else empty)
    return value


_ROLES = ("system", "user", "assistant")
_TOOLS = ("tool_calls", "function_call", "tool_call_id")
_PREFIX = "one answer is the beginning of the other"
_EMPTY_TURN = "a message of the prompt is empty"


def chat_turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chat(prompt: list[dict[str, str]], chosen: str, rejected: str) -> Pair:
    return {
        "prompt": prompt,
        "chosen": [chat_turn("assistant", chosen)],
        "rejected": [chat_turn("assistant", rejected)],
    }


def message_list(row: Row, field: str, last: str, where: str) -> list[dict[str, str]]:
    """A list of {role, content} that ends with a turn of `last`."""
    messages = row.get(field)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in messages)
        or messages[-1]["role"] != last
    ):
        raise InputError(
            f"{where}: field {field!r} must be a list of messages {{role, content}} that ends with the {last}"
        )
    for turn in messages:
        if turn["role"] not in _ROLES:
            raise InputError(
                f"{where}: {field} has a message of role {turn['role']!r:.40}; known are {', '.join(_ROLES)}"
            )
        if any(turn.get(name) for name in _TOOLS):
            raise InputError(f"{where}: {field} has a call of a tool; {_NO_TOOLS}")
    *before, answer = messages if last == "assistant" else [*messages, None]
    turns = [chat_turn(turn["role"], text_field(turn, "content", f"{where}, {field}", _EMPTY_TURN)) for turn in before]
    if answer is not None:
        turns.append(chat_turn(last, text_field(answer, "content", f"{where}, {field}")))
    return turns


def _trl(row: Row, where: str, preference: str | None) -> Pair:
    """TRL's explicit prompt, as plain text or as chat messages; all three fields in the same form."""
    _refuse_tools(row, where)
    if isinstance(row.get("prompt"), list):
        lasts = zip(COLUMNS, ("user", "assistant", "assistant"), strict=True)
        pair = {field: message_list(row, field, last, where) for field, last in lasts}
        for field in COLUMNS[1:]:
            if pair[field][: len(pair["prompt"])] == pair["prompt"]:
                raise InputError(
                    f"{where}: {field!r} repeats the messages of 'prompt'; leave the field 'prompt' out (the format "
                    "trl-implicit), or give the answers alone"
                )
        return pair
    return {field: text_field(row, field, where) for field in COLUMNS}


def _trl_implicit(row: Row, where: str, preference: str | None) -> Pair:
    """TRL's implicit prompt: what the two have in common at the start, in whole messages or up to a blank."""
    _refuse_tools(row, where)
    if isinstance(row.get("chosen"), list):
        chosen, rejected = (message_list(row, field, "assistant", where) for field in ("chosen", "rejected"))
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        if same is None:
            raise UnusableError("the two answers are identical" if len(chosen) == len(rejected) else _PREFIX)
        if not same:
            raise InputError(f"{where}: chosen and rejected share no first message: where is the prompt?")
        return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}
    require("train", "trl")
    from trl.data_utils import extract_prompt

    texts = {field: text_field(row, field, where) for field in ("chosen", "rejected")}
    if texts["chosen"] == texts["rejected"]:
        raise UnusableError("the two answers are identical")
    if texts["chosen"].startswith(texts["rejected"]) or texts["rejected"].startswith(texts["chosen"]):
        raise UnusableError(_PREFIX)
    pair = extract_prompt(texts)
    if not pair["prompt"].strip():
        raise InputError(f"{where}: chosen and rejected have no common beginning, and there is no field 'prompt'")
    return {field: text_field(pair, field, where) for field in COLUMNS}


def _ultrafeedback(row: Row, where: str, preference: str | None) -> Pair:
    """UltraFeedback-binarized (arXiv 2310.01377): the prompt as text, both answers as whole conversations, scores."""
    prompt = text_field(row, "prompt", where)
    chosen, rejected = (message_list(row, field, "assistant", where) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("the two conversations differ before the last answer")
    if not any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in chosen[:-1]):
        raise InputError(f"{where}: the text in 'prompt' is no user message of 'chosen'; which one is the prompt?")
    above, below = row.get("score_chosen"), row.get("score_rejected")
    for name, score in (("score_chosen", above), ("score_rejected", below)):
        if score is not None and type(score) not in (int, float):
            raise InputError(f"{where}: {name} {score!r:.40} is no number")
    if above is not None and below is not None:
        if above == below:
            raise UnusableError("both answers have the same score")
        if not above > below:
            raise InputError(f"{where}: score_chosen {above} is not above score_rejected {below}")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _pku(row: Row, where: str, preference: str | None) -> Pair:
    """PKU-SafeRLHF (arXiv 2310.12773): one pair of responses, ordered once by helpfulness and once by safety."""
    if preference not in PKU_LABELS:
        raise InputError(
            f"{where}: this data is labelled for {' and '.join(PKU_LABELS)}, not for {preference!r}; say which of "
            "them to use (label)"
        )
    better = row.get(PKU_LABELS[preference])
    if type(better) is not int or better not in (0, 1):
        raise InputError(f"{where}: field {PKU_LABELS[preference]!r} is {better!r}; expected 0 or 1")
    responses = [text_field(row, "response_0", where), text_field(row, "response_1", where)]
    return _chat([chat_turn("user", text_field(row, "prompt", where))], responses[better], responses[1 - better])


def _safe_unsafe(row: Row, where: str, preference: str | None) -> Pair:
    """A prompt and [safe answer, unsafe answer]."""
    if preference == "helpful":
        raise InputError(f"{where}: the answers are ordered [safe, unsafe], which says nothing of {preference!r}")
    answers = row.get("response")
    if not isinstance(answers, list) or len(answers) != 2:
        raise InputError(f"{where}: field 'response' must be a list of two texts, [safe, unsafe]")
    safe, unsafe = (text_field({"response": answer}, "response", where) for answer in answers)
    return _chat([chat_turn("user", text_field(row, "prompt", where))], safe, unsafe)


_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def transcript_turns(row: Row, field: str, where: str) -> list[dict[str, str]]:
    """The messages of a transcript in HH-RLHF's form, from the first question to the last answer."""
    before, *turns = _TURN.split(text_field(row, field, where))
    messages = [
        chat_turn(_SPEAKERS[speaker], said.strip()) for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if before.strip() or not messages or messages[0]["role"] != "user" or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: field {field!r} is no transcript; expected '\\n\\nHuman: …' first and '\\n\\nAssistant: …' last"
        )
    if not messages[-1]["content"]:
        raise UnusableError("an answer is empty")
    return messages


def _hh(row: Row, where: str, preference: str | None) -> Pair:
    """HH-RLHF (arXiv 2204.05862): two transcripts that differ in the last answer only."""
    chosen, rejected = transcript_turns(row, "chosen", where), transcript_turns(row, "rejected", where)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("the two transcripts differ before the last answer")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def sharegpt_turns(row: Row, where: str) -> list[dict[str, str]]:
    """The messages of conversations [{from, value}], after the row's system message."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: field 'conversations' must be a list of {{from, value}}")
    return [*system_turns(row, where), *(_sharegpt_turn(value, "conversations", where) for value in turns)]


def _sharegpt_turn(value: Any, field: str, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or value.get("from") not in _SHAREGPT_ROLES:
        speaker = value.get("from") if isinstance(value, Mapping) else value
        known = ", ".join(_SHAREGPT_ROLES)
        raise InputError(f"{where}: {field} has a turn from {speaker!r:.40}; expected {{from, value}} of {known}")
    empty = {"empty": _EMPTY_TURN} if field == "conversations" else {}
    return chat_turn(_SHAREGPT_ROLES[value["from"]], text_field(value, "value", f"{where}, {field}", **empty))


def _sharegpt(row: Row, where: str, preference: str | None) -> Pair:
    """ShareGPT ranking as in LLaMA-Factory: conversations [{from, value}], chosen and rejected {from, value}."""
    prompt = sharegpt_turns(row, where)
    answers = {
        field: chat_turn("assistant", text_field(row, field, where))
        if isinstance(row.get(field), str)
        else _sharegpt_turn(row.get(field), field, where)
        for field in ("chosen", "rejected")
    }
    if prompt[-1]["role"] != "user" or any(answer["role"] != "assistant" for answer in answers.values()):
        raise InputError(f"{where}: conversations must end with human, chosen and rejected must be from gpt")
    return {"prompt": prompt, **{field: [answer] for field, answer in answers.items()}}


def alpaca_prompt(row: Row, where: str) -> list[dict[str, str]]:
    """The messages of instruction and input, after system and history where given."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"{where}: field 'history' must be a list of [instruction, answer]")
    prompt = system_turns(row, where)
    for asked, answered in history:
        prompt.append(chat_turn("user", text_field({"history": asked}, "history", where, _EMPTY_TURN)))
        prompt.append(chat_turn("assistant", text_field({"history": answered}, "history", where, _EMPTY_TURN)))
    asked = text_field(row, "instruction", where)
    if row.get("input"):
        asked += "\n" + text_field(row, "input", where)
    return [*prompt, chat_turn("user", asked)]


def _alpaca(row: Row, where: str, preference: str | None) -> Pair:
    """Alpaca ranking as in LLaMA-Factory: instruction, input, chosen, rejected; system and history where given."""
    prompt = alpaca_prompt(row, where)
    return _chat(prompt, text_field(row, "chosen", where), text_field(row, "rejected", where))


_NO_TOOLS = "conversations with tools are not supported; leave such rows out"


def _refuse_tools(row: Row, where: str) -> None:
    if row.get("tools"):
        raise InputError(f"{where}: {_NO_TOOLS}")


def system_turns(row: Row, where: str) -> list[dict[str, str]]:
    _refuse_tools(row, where)
    return [chat_turn("system", text_field(row, "system", where))] if row.get("system") else []


def _fields(*names: str) -> Callable[[Row], bool]:
    return lambda row: set(names) <= set(row)


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _both(row: Row, kind: type) -> bool:
    return all(isinstance(row.get(field), kind) for field in ("chosen", "rejected"))


_ELSEWHERE = {"prompt", "instruction", "conversations"}

FORMATS = {
    format.name: format
    for format in (
        Format(
            "trl",
            "prompt, chosen, rejected, all three texts or all three lists of {role, content}",
            "TRL's preference format with an explicit prompt",
            lambda row: set(COLUMNS) <= set(row) and not (isinstance(row["prompt"], str) and _both(row, list)),
            _trl,
        ),
        Format(
            "trl-implicit",
            "chosen, rejected, as texts or lists of {role, content} that begin with the same prompt",
            "TRL's preference format with an implicit prompt",
            lambda row: (
                not _ELSEWHERE & set(row)
                and (_both(row, list) or (_both(row, str) and not any(_is_transcript(row[f]) for f in COLUMNS[1:])))
            ),
            _trl_implicit,
        ),
        Format(
            "hh-rlhf",
            "chosen, rejected, as transcripts '\\n\\nHuman: … \\n\\nAssistant: …'",
            "Anthropic's HH-RLHF",
            lambda row: any(_is_transcript(row.get(field)) for field in ("chosen", "rejected")),
            _hh,
        ),
        Format(
            "pku-saferlhf",
            f"prompt, response_0, response_1, {', '.join(PKU_LABELS.values())}",
            "PKU-SafeRLHF: a label for helpful and one for harmless on every pair",
            _fields("response_0", "response_1"),
            _pku,
        ),
        Format(
            "ultrafeedback",
            "prompt as text, chosen and rejected as lists of {role, content}, score_chosen and score_rejected if any",
            "UltraFeedback-binarized",
            lambda row: isinstance(row.get("prompt"), str) and _both(row, list),
            _ultrafeedback,
        ),
        Format(
            "sharegpt",
            "conversations [{from, value}], chosen and rejected {from, value}, system if any",
            "ShareGPT ranking, as in LLaMA-Factory",
            _fields("conversations", "chosen", "rejected"),
            _sharegpt,
        ),
        Format(
            "alpaca",
            "instruction, chosen, rejected, and input, system, history if any",
            "Alpaca ranking, as in LLaMA-Factory",
            _fields("instruction", "chosen", "rejected"),
            _alpaca,
        ),
        Format(
            "safe-unsafe",
            "prompt, response [safe, unsafe]",
            "pairs ordered by safety alone, the safe answer first",
            lambda row: isinstance(row.get("response"), list) and "prompt" in row,
            _safe_unsafe,
        ),
    )
}

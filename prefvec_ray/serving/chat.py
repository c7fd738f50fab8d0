"""System messages for chat templates that know none."""

from collections.abc import Sequence

from prefvec_ray.common.errors import InputError

SYSTEM = {"system", "developer"}
"""OpenAI's two names for the operator's word to the model"""


def fold_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with its system messages in front of the first user message's text, an empty line after each.

    Raises InputError where one comes later, or no user message follows.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] not in SYSTEM), len(messages))
    said, rest = messages[:first], list(messages[first:])
    if any(message["role"] in SYSTEM for message in rest):
        raise InputError("a system message after others cannot be given to this model; put it first")
    if not said:
        return rest
    if not rest or rest[0]["role"] != "user":
        raise InputError("this model is given a system message with the first user message; let one follow it")
    text = "\n\n".join(message["content"] for message in (*said, rest[0]))
    return [{**rest[0], "content": text}, *rest[1:]]

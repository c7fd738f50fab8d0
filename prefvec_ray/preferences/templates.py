"""Chat templates for bases that have none."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefvec_ray.common.chat import begins_with_bos
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSCRIPT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('a transcript knows only user and assistant messages, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '\\n\\n' + ('Human' if message['role'] == 'user' else 'Assistant') + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""HH-RLHF's own transcript form, for a base whose tokenizer has no chat template (`chat_template: transcript`)."""


def read_template(name: str) -> str:
    """The chat template that a config's `chat_template` names: a Jinja file, or `transcript`."""
    if name == "transcript":
        return TRANSCRIPT_TEMPLATE
    if not Path(name).is_file():
        raise InputError(f"chat_template {name}: neither a file nor 'transcript'")
    return read_text(name, what="chat_template", limit=1 << 20)


def give_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set the chat template that `name` stands for (see `read_template`).

    A `transcript` begins with the BOS token where the tokenizer puts one before text: a base was trained with it.
    """
    template = read_template(name)
    if name == "transcript" and begins_with_bos(tokenizer):
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template

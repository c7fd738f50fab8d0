"""Chat templates for bases that have none."""

from pathlib import Path

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_text

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

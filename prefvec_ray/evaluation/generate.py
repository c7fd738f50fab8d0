"""Answers to be sampled for an evaluation: prompts as token ids, and requests whose random numbers are reproducible.

The random numbers of an answer belong to (seed, prompt, sample), and its tokens to them and the setting: what else is
in the batch changes nothing (beyond the last bits of floating point), and two settings of the coefficients see the same
numbers: common random numbers, which make their paired difference less noisy than independent numbers would.
"""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from blake3 import blake3
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from prefvec_ray.common.chat import text_prompt
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.generation.base import Coefficients, Request
from prefvec_ray.generation.offline import OfflineEngine
from prefvec_ray.generation.sampling_params import SamplingParams

Conversation = str | Sequence[dict[str, str]]
"""Messages for the tokenizer's chat template, or a plain text that the model continues."""


class Sampling(Config):
    """How answers are sampled."""

    renamed: ClassVar[dict[str, str]] = {"draws": "samples_per_prompt"}

    samples_per_prompt: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=2, allow_inf_nan=False)
    """0 is greedy."""
    max_new_tokens: int = Field(default=64, ge=1)
    seed: int = 0


def sample(
    engine: OfflineEngine,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    coefficients: Coefficients = (),
) -> list[list[str]]:
    """Answers to every conversation as text, indexed `[conversation][sample]`; special tokens are dropped.

    An answer ends with one of the model's end tokens or after `max_new_tokens`. Raises as `OfflineEngine.answer`.
    """
    requests = answer_requests(encode(tokenizer, conversations), coefficients, sampling)
    answers = by_prompt(engine.answer(requests), sampling.samples_per_prompt)
    return [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in answers]


def answer_requests(prompts: Sequence[Sequence[int]], coefficients: Coefficients, sampling: Sampling) -> list[Request]:
    """`samples_per_prompt` requests for each prompt, prompt by prompt. A prompt that is there twice gets other answers
    the second time."""
    requests = []
    asked: Counter[tuple[int, ...]] = Counter()
    for ids in prompts:
        prompt = tuple(ids)
        digest = blake3(f"{sampling.seed}/{prompt}".encode()).digest(8)
        params = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=int.from_bytes(digest, "little", signed=True),
            detokenize=False,
        )
        first = asked[prompt]
        asked[prompt] += sampling.samples_per_prompt
        requests += [Request(prompt, coefficients, params, choice) for choice in range(first, asked[prompt])]
    return requests


def by_prompt(answers: Sequence[Sequence[int]], samples: int) -> list[list[list[int]]]:
    """What `answer_requests` got, indexed [prompt][sample]."""
    return [[list(row) for row in answers[i : i + samples]] for i in range(0, len(answers), samples)]


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of each conversation, up to where the assistant begins to speak."""
    prompts: list[list[int]] = []
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, str):
            ids = text_prompt(tokenizer, conversation)
        elif tokenizer.chat_template is None:
            raise InputError(
                f"prompt {index} is a conversation but the tokenizer has no chat template; "
                "set tokenizer.chat_template or give plain text"
            )
        else:
            ids = tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=False)
        if not ids:
            raise InputError(f"prompt {index} has no tokens; give a text that is not empty")
        prompts.append(ids)
    return prompts

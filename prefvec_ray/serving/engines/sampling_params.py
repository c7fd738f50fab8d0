"""Sampling parameters, each declared once: its name, type, bounds and default.

To add one, declare it in `SharedParams`, by the name that vLLM's request bodies have for it, and use it where the slot
engine chooses tokens (`sampling.py`). Request bodies accept it and it travels to the engines without further edits.
Names and order of what is applied are vLLM's: bias and penalties, temperature, `min_p`, `top_k`, `top_p`.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
"""as OpenAI's API has it: keys of JSON objects are strings"""
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class SharedParams(BaseModel):
    """The parameters that request bodies and engines know by one name, with OpenAI's defaults."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=128)
    """answers to each prompt"""
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """of an answer; None: as many as the operator allows and the context has room for"""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 is greedy"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample from the smallest set of tokens that holds this much probability (Holtzman et al., arXiv 1904.09751)"""
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """sample from this many of the likeliest tokens; 0 or -1: from all"""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """sample from tokens of at least this share of the likeliest one's probability (Nguyen et al., arXiv 2407.01082)"""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """taken from the logits of tokens that the answer has already"""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """taken from the logits of tokens, as often as the answer has them"""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """divides the positive logits of tokens that prompt or answer have, multiplies the negative ones (Keskar et al.,
    arXiv 1909.05858)"""
    logit_bias: dict[TokenId, Bias] = Field(default_factory=dict, max_length=128)
    """token id -> what is added to its logit"""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """of the random numbers; None: other numbers every time"""
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] = Field(default_factory=list)
    """texts that end the answer; they are not part of it"""


class SamplingParams(SharedParams):
    """How the tokens of an answer are chosen, and what is reported of them."""

    logprobs: int | None = Field(default=None, ge=0, le=20)
    """how many of each position's likeliest tokens to report, with log-probabilities; None: none, nor the chosen one's.
    Not shared: chats and text completions ask for it in two different ways"""

    json_schema: str | None = None
    """a JSON schema, as JSON: the answer is a text of it. Not shared: chats ask for it as `response_format`"""

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def biases(self) -> dict[int, float]:
        return {int(token): bias for token, bias in self.logit_bias.items()}

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

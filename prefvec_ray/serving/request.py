"""What the front asks of a replica, and what comes back. Plain data: it travels between processes."""

from dataclasses import dataclass
from typing import TypeAlias

from prefvec_ray.serving.engines.base import Coefficients, OutputDelta

ReleaseId: TypeAlias = tuple[str, int]
"""deployment and generation: while one deployment takes another's place, replicas of both get jobs of both"""

Prompt: TypeAlias = str | tuple[int, ...] | tuple[dict[str, str], ...]
"""text, token ids, or the messages of a chat"""


@dataclass(frozen=True)
class GenerationRequest:
    """One HTTP request's worth of answers: `n` for each prompt, all at the same coefficients."""

    prompts: tuple[Prompt, ...]
    coefficients: Coefficients
    n: int = 1
    max_new_tokens: int | None = None
    """None: as many as the operator allows and the context has room for"""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_prompt_tokens: int | None = None
    """longest prompt that its caller may send; None: what the context has room for"""
    release: ReleaseId = ("", 0)
    """whose vectors the coefficients are of"""
    resume_tokens: tuple[tuple[int, ...], ...] = ()
    """the tokens of each answer that its caller has received already; empty: none of any"""
    caller: str = ""
    """whose request it is: each caller's prompts are tokenized in turn"""
    id: str = ""
    """under which the replica counts what it generates; see `Replica.spent`"""
    logprobs: int | None = None
    """how many of each position's likeliest tokens to tell, with log-probabilities; None: none, nor the chosen one's"""


@dataclass(frozen=True)
class Started:
    """First item of a job's stream: the prompts fit, generation resume_tokens."""

    prompt_tokens: int


Event: TypeAlias = tuple[int, OutputDelta]
"""which answer (prompt index x n + number of the choice), and its next piece"""

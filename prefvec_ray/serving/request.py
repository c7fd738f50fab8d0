"""What the front asks of a replica, and what comes back: plain data that travels between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from prefvec_ray.serving.engines.base import Coefficients, OutputDelta
from prefvec_ray.serving.engines.sampling_params import SamplingParams

ReleaseId: TypeAlias = tuple[str, int]
"""deployment and generation: while one deployment takes another's place, replicas of both get requests of both"""

Prompt: TypeAlias = str | tuple[int, ...] | tuple[dict[str, str], ...]
"""text, token ids, or the messages of a chat"""


@dataclass(frozen=True)
class GenerationRequest:
    """One HTTP request's worth of answers: `sampling.n` for each prompt, all at the same coefficients."""

    prompts: tuple[Prompt, ...]
    coefficients: Coefficients
    sampling: SamplingParams
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
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context of the front's span; empty where there is none"""

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.sampling.n


@dataclass(frozen=True)
class PassedRequest:
    """One HTTP request for vLLM's own server code."""

    chat: bool
    """or a text completion"""
    body: Mapping[str, Any]
    """OpenAI's, without anything of ours"""
    coefficients: Coefficients
    max_prompt_tokens: int | None = None
    """as of a `GenerationRequest`; so are the other fields"""
    release: ReleaseId = ("", 0)
    caller: str = ""
    id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)


ReplicaRequest: TypeAlias = GenerationRequest | PassedRequest


@dataclass(frozen=True)
class WholeAnswer:
    """OpenAI's object for a `PassedRequest` that does not stream."""

    body: bytes
    """as JSON"""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class StreamPart:
    """The next events of the stream of a `PassedRequest`."""

    events: bytes
    """as they go to the caller"""
    prompt_tokens: int
    """of all of its prompts that generate already"""
    new_tokens: int
    """generated so far"""


@dataclass(frozen=True)
class Started:
    """First item of a request's stream: the prompts fit, generation begins."""

    prompt_tokens: int


Event: TypeAlias = tuple[int, OutputDelta]
"""which answer (index of the prompt x n + number of the choice), and what comes next of it"""

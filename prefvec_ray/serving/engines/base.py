"""What an engine is: tokens and coefficients in, parts of a text out. It knows nothing of HTTP, Ray or policies.

`SlotEngine` (slots/engine.py) is one, on plain transformers models. vLLM has its own: see vllm/client.py.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.engines.sampling_params import SamplingParams

if TYPE_CHECKING:  # torch, which the front does without
    from prefvec_ray.vectors import PreferenceVector

Coefficients: TypeAlias = tuple[tuple[str, float], ...]
"""(preference, eta) for every served preference, sorted by name: hashable, and equal where the weights are"""

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass
class Timeline:
    """When an engine did what for a request, in nanoseconds since 1970; 0: not yet."""

    submitted: int = 0
    admitted: int = 0
    """it had a place among those that run"""
    first: int = 0
    """token"""
    last: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Request:
    """One answer to generate. What is generated depends on these fields (without a seed, on chance too), never on other
    requests."""

    prompt: tuple[int, ...]
    """token ids, at least one"""
    coefficients: Coefficients
    sampling: SamplingParams
    """`max_tokens` must be set here; `n` is of no concern to an engine"""
    choice: int = 0
    """number of this answer among the `n` of its prompt: with the seed, it decides the random numbers"""
    resume_tokens: tuple[int, ...] = ()
    """the answer's first tokens, where its caller has received them already from a replica that died. The engine takes
    them as they are: within rounding distance it might have chosen others"""
    caller: str = ""
    """whose request it is. Only when it is computed depends on this; "" is all that have no name"""
    timeline: Timeline = field(default_factory=Timeline, compare=False)
    """written by the engine"""

    @property
    def max_tokens(self) -> int:
        """Most tokens of the answer. Raises InputError where the sampling parameters leave it open."""
        if self.sampling.max_tokens is None:
            raise InputError("max_tokens is not set; an engine needs a number")
        return self.sampling.max_tokens

    def random_key(self) -> str:
        """What seeds the answer's random numbers: the same for the same seed, new each time where there is none."""
        seed = secrets.token_hex(8) if self.sampling.seed is None else self.sampling.seed
        return f"{seed}/{self.choice}"


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and how likely the model found it at its position."""

    text: str
    bytes: bytes
    """those that it stands for; `text` shows the replacement character where they are half a character"""
    logprob: float
    """natural logarithm of its probability, before temperature and top_p"""


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of an answer's text."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    """the likeliest at this position, best first"""
    offset: int
    """where in the answer's text it begins, in characters"""


@dataclass(frozen=True)
class OutputDelta:
    """The next part of an answer. The texts of all deltas, joined, are the whole answer."""

    text: str
    tokens: tuple[int, ...]
    """token ids since the last delta; the end-of-text token counts, though it has no text"""
    finish_reason: FinishReason | None = None
    """set on the last delta: "stop" after an end-of-text token or stop string, "length" at max_tokens"""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """of the tokens that begin within the texts so far, where the request asks for them; a token that ends the answer
    or belongs to a stop string has none"""

    def followed_by(self, other: "OutputDelta") -> "OutputDelta":
        return OutputDelta(
            self.text + other.text, self.tokens + other.tokens, other.finish_reason, self.logprobs + other.logprobs
        )


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing and has done since it started."""

    running: int
    waiting: int
    finished: int
    cancelled: int
    failed: int
    tokens: int
    """generated, over all answers"""
    merges: int
    """times that the weights were rewritten to other coefficients"""
    cached_tokens: int = 0
    """whose keys and values the slot engine holds; vLLM's own metrics have its cache"""


Emit: TypeAlias = Callable[[OutputDelta | Exception], object]
"""called with every delta of an answer, or once with what went wrong"""


class Submitted(Protocol):
    """A request that an engine works on."""

    def cancel(self) -> object:
        """Stop the generation, and free its place. Nothing is emitted any more. An ended request is left alone."""
        ...


class EngineError(RuntimeError):
    """The engine failed while it worked on this request; nothing is wrong with the request itself."""


class PromptTooLongError(InputError):
    """Prompt and answer do not fit into the model's context together."""


class Engine(Protocol):
    """Generates many answers at once, each at its own coefficients."""

    context: int
    """most tokens that prompt and answer may have together"""

    def check(self, request: Request) -> None:
        """Raises InputError where the request cannot be served: no prompt, unknown tokens, longer than the context."""
        ...

    def submit(self, request: Request, emit: Emit) -> Submitted:
        """Queue a request. `emit` is called in a thread of the engine's choice; see `stream_outputs` for event loops.

        Raises InputError as `check` does, and EngineError where the engine is closed.
        """
        ...

    async def change(self, vectors: "Mapping[str, PreferenceVector]") -> None:
        """Know these vectors, by the names that coefficients use, from the next step on; running requests go on.
        Names that running requests use must stay, and stand for the same vectors.

        Raises InputError where one does not fit; nothing has changed then.
        """
        ...

    def status(self) -> EngineStatus: ...

    def check_alive(self) -> None:
        """Raises EngineError where the engine can no longer answer."""
        ...

    def close(self) -> None:
        """End the engine; running requests get EngineError."""
        ...

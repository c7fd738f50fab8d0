"""What an operator writes to serve a base model with its preference vectors: the `args` of `serve_configs/*.yaml`."""

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from prefvec_ray.common.config import Config, load_config
from prefvec_ray.common.names import Name
from prefvec_ray.registry.names import THROUGH_RAY

DIGEST = "blake3:"
"""a fingerprint begins so"""
BODY_BYTES = 16_000_000
"""the largest `body_bytes` that an endpoint may be given"""


class Range(Config):
    """The coefficients that callers may ask for, and what they get when they ask for none."""

    min: FiniteFloat = -1.0
    """[-1, 1] is where the vectors' effect was seen to be smooth and the text to stay valid"""
    max: FiniteFloat = 1.0
    default: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError(
                f"expected min <= default <= max, got min {self.min}, default {self.default}, max {self.max}; a range"
                " without 0 needs a default of its own"
            )
        return self


class EngineConfig(Config):
    """How one replica generates."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """transformers: the slot engine, for any model of transformers. vllm: vLLM, where it is installed"""
    mode: Literal["merged", "steered"] = "merged"
    """merged: one set of coefficients at a time in the weights, any vectors, best where callers share settings.
    steered: low-rank vectors beside the weights, every request its own coefficients in one batch"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the base is stored"""
    device: str = "auto"
    """auto: the replica's GPU where it was given one, else the CPU"""
    max_batch: PositiveInt = 32
    """requests that run at once; the others wait"""
    max_new_tokens: PositiveInt = 512
    """most tokens of one answer, and the number where the caller names none"""
    stream_interval: PositiveInt = 1
    """tokens that a part of a streamed answer has at least, after the first; each part costs front and proxy the same,
    however much is in it"""
    switch_share: float = Field(default=0.1, gt=0, le=1)
    """merged: share of time that may go into rewriting the weights while several sets of coefficients take turns;
    smaller gives more tokens a second and longer pauses within each answer. In the slot engine up to a quarter of a
    turn that ends early, because a first token waits whose caller had less"""
    threads: PositiveInt = 1
    """torch threads; for small models one is fastest"""
    columns: PositiveInt | None = None
    """kind: vllm, steered: the most that the vectors' ranks may add up to, those of running requests included. Columns
    that no vector uses cost time too. None: twice what is served at the start, enough to replace all of it"""
    vllm: dict[str, Any] = {}
    """kind: vllm only: more of vLLM's engine arguments, such as gpu_memory_utilization or tensor_parallel_size"""

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.vllm and self.kind != "vllm":
            raise ValueError(f"'vllm' settings with kind: {self.kind}; give kind: vllm, or leave them out")
        if self.columns and (self.kind, self.mode) != ("vllm", "steered"):
            raise ValueError("'columns' is for kind: vllm with mode: steered; leave it out")
        if self.kind == "vllm" and self.device != "auto":
            raise ValueError(f"device: {self.device}: vLLM chooses its device itself; leave it out")
        return self

    @property
    def ranks(self) -> int:
        """Parts that a replica's model is split into."""
        sizes = [self.vllm.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
        return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


class ReplicaConfig(Config):
    """How many replicas, and what each needs."""

    min: int = Field(default=1, ge=0)
    max: PositiveInt = 1
    """more than `min`: Serve adds and removes replicas between the two"""
    target_requests: PositiveFloat = 16.0
    """running and waiting requests per replica that autoscaling aims at"""
    window_seconds: PositiveFloat = 30.0
    """requests are counted as their mean over so long"""
    grow_seconds: NonNegativeFloat = 10.0
    """more replicas must be needed for so long before they are added; the first one comes at once"""
    shrink_seconds: NonNegativeFloat = 300.0
    """fewer must be needed for so long before any go"""
    idle_seconds: NonNegativeFloat | None = None
    """min: 0 only: no request for so long before the last one goes. None: as `shrink_seconds`"""
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got min {self.min} and max {self.max}")
        return self


class LimitsConfig(Config):
    """What a single request may ask of the service."""

    body_bytes: int = Field(default=1_000_000, gt=0, le=BODY_BYTES)
    body_seconds: PositiveFloat = 30.0
    """a caller that takes longer to send its body gets 408"""
    prompt_tokens: PositiveInt | None = None
    """of each prompt; None: what the model's context has room for"""
    answers: PositiveInt = 16
    """prompts x n"""
    queued_requests: PositiveInt = 256
    """requests that wait for a replica before new ones get 503"""
    seconds: PositiveFloat = 300.0
    """a request that takes longer is ended with 504"""


class Allowance(Config):
    """What one caller may do. None: as `limits` says for everybody, or without limit."""

    coefficients: Literal["free", "presets"] = "free"
    """free: any within the ranges. presets: presets, and the operator's default, only"""
    presets: tuple[Name, ...] | None = None
    """the presets that may be asked for; None: all that lie within the ranges"""
    requests_per_minute: PositiveInt | None = None
    requests_at_once: PositiveInt | None = None
    """requests under way at one time; one more gets 429"""
    tokens_per_minute: PositiveInt | None = None
    """of prompts and answers; a request is counted at the most it may use until it is done. A request that is refused
    for its content is counted too, as tokens of its body"""
    tokens_per_day: PositiveInt | None = None
    answers: PositiveInt | None = None
    """prompts x n of one request"""
    prompt_tokens: PositiveInt | None = None
    seconds: PositiveFloat | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens are limited."""
        return self.tokens_per_minute is not None or self.tokens_per_day is not None

    @property
    def is_limited(self) -> bool:
        """Whether anything is limited that is counted over requests."""
        return self.counts_tokens or self.requests_per_minute is not None or self.requests_at_once is not None


class AnonymousConfig(Allowance):
    """Callers without a key. Rates are those of all of them together."""

    allowed: bool = True


class AuditConfig(Config):
    """Where decisions about requests are written, one line of JSON each."""

    file: Path
    megabytes: PositiveFloat = 10.0
    """size at which the next file begins"""
    files: int = Field(default=5, ge=2)
    """files kept; older lines are lost"""
    below_floor: Path | None = None
    """where answers below a floor are also written, without an end: no number of other requests pushes them out. None:
    beside `file`, as `audit.below-floor.jsonl` for `audit.jsonl`. Such an answer is refused where this file cannot be
    written"""

    @property
    def below_floor_file(self) -> Path:
        return self.below_floor or self.file.with_name(f"{self.file.stem}.below-floor{self.file.suffix}")

    @model_validator(mode="after")
    def _two_files(self) -> Self:
        if self.below_floor_file == self.file:
            raise ValueError(f"'below_floor' is the audit's own file {self.file}; name another")
        return self


class LogsConfig(Config):
    """What front and replicas write into Ray's `logs/serve`."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access: bool = False
    """a line for every request, in the front's log and its replica's; metrics count them, `audit` says who asked"""


class TracesConfig(Config):
    """An OpenTelemetry collector that is sent a trace of each request: what was asked for and how long each part took,
    never what was said."""

    endpoint: str = Field(pattern=r"^https?://\S+$")
    """its address for OTLP over HTTP, such as http://collector:4318/v1/traces"""
    sample: float = Field(default=1.0, ge=0, le=1)
    """share of the requests"""


class ServingConfig(Config):
    """One served model. Relative paths are taken from the folder that the command runs in."""

    model: Name
    """the name that clients ask for; a preset is `<model>@<preset>`"""
    base: Path
    """folder of the base model, with its tokenizer"""
    quantized_from: str | None = None
    """where `base` is a quantized copy: the model that it was made from, on which the vectors were trained. Its folder,
    or its fingerprint `blake3:…`. For kind: vllm with mode: steered"""
    registry: str
    """folder or bucket of the registry; or `ray:<actor>` (such as `ray:prefvec-registry-1a2b3c4d`), which also serves
    nodes that do not reach that folder"""
    vectors: dict[Name, str] | None = None
    """preference -> reference such as `helpful@1` or `helpful@production`, fixed to a version at deployment.
    Default: the newest version of every vector of this base; with `floors` they must be named"""
    follow_seconds: PositiveFloat | None = None
    """check this often whether `vectors` now stand for other versions, and roll those out. None: only when `prefvec
    roll-out` is run"""
    ranges: dict[Name, Range] = {}
    """preference -> allowed coefficients, for anonymous callers and for keys without a range of their own"""
    default_range: Range = Range()
    """for preferences that `ranges` does not name"""
    floors: dict[Name, FiniteFloat] = {}
    """preference -> the least coefficient that anyone gets, by whatever way; but for keys that may go below"""
    anonymous: AnonymousConfig = AnonymousConfig()
    keys: Path | None = None
    """file of API keys, see `prefvec keys`; read again when it changes"""
    audit: AuditConfig | None = None
    engine: EngineConfig = EngineConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    ingress_replicas: PositiveInt = 1
    """processes that take HTTP requests and write answers; they hold no model. More than one share rates and roll-outs
    through a coordinator: for when one process cannot write all streams"""
    limits: LimitsConfig = LimitsConfig()
    logs: LogsConfig = LogsConfig()
    traces: TracesConfig | None = None
    system: Literal["template", "fold"] = "template"
    """system messages of a chat. template: as the model's chat template takes them, or refuses them. fold: put in front
    of the first user message, for a template that knows no system role"""

    @model_validator(mode="after")
    def _named_beside_floors(self) -> Self:
        if self.floors and self.vectors is None:
            raise ValueError(
                "'floors' without 'vectors': any vector that is published later would be served beside them without a"
                " floor; name the served vectors, such as vectors: {harmless: harmless@production}"
            )
        return self

    @model_validator(mode="after")
    def _beside_quantized_weights(self) -> Self:
        if self.quantized_from and (self.engine.kind, self.engine.mode) != ("vllm", "steered"):
            raise ValueError(
                "'quantized_from' with another engine than kind: vllm, mode: steered: there vectors are added beside"
                " quantized weights, nowhere are they written into them; set both, or serve the model itself"
            )
        return self

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if self.keys is None and not self.anonymous.allowed:
            raise ValueError("nobody may call: anonymous callers are not allowed and there are no 'keys'; name a file")
        return self

    @model_validator(mode="after")
    def _gpus_for_ranks(self) -> Self:
        gpus, ranks = self.replicas.gpus, self.engine.ranks
        if self.engine.kind == "vllm" and gpus not in (0, ranks) and not (ranks == 1 and gpus < 1):
            raise ValueError(
                f"replicas: gpus is {gpus:g}, but tensor_parallel_size x pipeline_parallel_size is {ranks}; each needs"
                " one GPU"
            )
        return self

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What one replica needs: of each bundle all on one node. vLLM's ranks may be on several."""
        wanted = self.replicas
        if self.engine.kind != "vllm" or not wanted.gpus:
            return [{"cpu": wanted.cpus, "gpu": wanted.gpus}]
        each = {"cpu": 0.0, "gpu": wanted.gpus / self.engine.ranks}
        return [each | {"cpu": wanted.cpus}, *[each] * (self.engine.ranks - 1)]

    def absolute(self) -> "ServingConfig":
        """The same with absolute paths, for processes that run in other folders."""
        elsewhere = "://" in self.registry or self.registry.startswith(THROUGH_RAY)
        registry = self.registry if elsewhere else str(Path(self.registry).absolute())
        paths: dict[str, Any] = {"base": self.base.absolute(), "registry": registry}
        if self.quantized_from and not self.quantized_from.startswith(DIGEST):
            paths["quantized_from"] = str(Path(self.quantized_from).absolute())
        if self.keys:
            paths["keys"] = self.keys.absolute()
        if self.audit:
            below = self.audit.below_floor_file.absolute()
            paths["audit"] = self.audit.model_copy(update={"file": self.audit.file.absolute(), "below_floor": below})
        return self.model_copy(update=paths)


class _Application(BaseModel):
    name: str | None = None
    args: ServingConfig


class _Deployment(BaseModel):
    applications: list[_Application] = Field(min_length=1)


def load_application(path: str | Path) -> tuple[str | None, ServingConfig]:
    """The name (None without one) and the settings (`args`) of the first application in a file for `serve deploy`.

    Raises InputError as `load_config` does.
    """
    first = load_config(path, _Deployment).applications[0]
    return first.name, first.args

"""Results of training: `run.json` of one DPO run, `training.json` of a job, and the data that both were made from."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prefvec_ray.common.config import Config

Polarity = Literal["positive", "negative"]
Quantization = Literal["nf4", "int8"]
SIGN: dict[Polarity, str] = {"positive": "+", "negative": "-"}
MIXED = "mixed"
"""In place of a preference: the baseline trained on all preferences' pairs at once."""
KL = "kl"
"""In `RunResult.watched`: the drift from the base, among the held-out sets."""


def vector_key(preference: str, seed: int) -> str:
    """`helpful-s0`: the name of a preference's vector of one seed within a job."""
    return f"{preference}-s{seed}"


class Artifact(BaseModel):
    """A frozen result. Fields of another release are ignored."""

    model_config = ConfigDict(frozen=True)


class Method(Config):
    """How a run changes the model."""

    kind: Literal["full", "lora"] = "full"
    lora: dict[str, Any] = {}
    """Fields of PEFT's LoraConfig."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's settings in full; None: no DeepSpeed."""
    fsdp: dict[str, Any] | None = None
    """Fields of transformers' `fsdp_config`; None: no FSDP. With neither, plain DDP."""
    quantize: Quantization | None = None
    """What the base's linear layers are rounded to while adapters are trained beside them; None: they stay as they
    are."""

    @property
    def key(self) -> dict[str, Any]:
        """For the keys of results. Without fields that came later where they are None, so that keys of earlier releases
        hold."""
        return self.model_dump(exclude={name for name in ("fsdp", "quantize") if getattr(self, name) is None})


PLAIN = Method()
"""A full run under plain DDP."""


class Watch(Config):
    """What is measured of a run while it trains, and when it is stopped. It changes no result and is no part of a
    key."""

    evaluations: int = Field(default=5, ge=0)
    """How often a run is measured on held-out pairs while it trains; at its end it is measured on all of them."""
    held_out_pairs: int = Field(default=64, ge=1)
    """At most this many held-out pairs each time."""
    kl_samples: int = Field(default=16, ge=0)
    """Answers that the base gives to held-out prompts, two a prompt, by which KL(base || run) is estimated; 0: none."""
    kl_tokens: int = Field(default=64, ge=1)
    """Length of those answers, at most, in tokens."""
    wrong_way: float | None = Field(default=3, gt=0)
    """A run is stopped when its held-out accuracy is on the wrong side of 0.5 by more than this many standard errors,
    twice in a row; null: never."""
    report_to: list[Literal["wandb", "mlflow"]] = []
    """Trackers to write to beside TensorBoard; each has to be installed and configured where the workers run."""


class RunSpec(Artifact):
    """One DPO run, complete: equal specs give equal deltas, and `key` names the result on disk."""

    key: str
    preference: str
    polarity: Polarity
    seed: int
    base: str
    base_fingerprint: str
    data_digest: str
    train: list[str]
    """Folders of reference datasets; several are mixed in equal shares, as many pairs in all as the largest has."""
    test: dict[str, str] = Field(min_length=1)
    """Held-out pairs by preference, never flipped."""
    dpo: dict[str, Any] = {}
    """Fields of TRL's DPOConfig."""
    method: Method = Method()
    out: str
    """Folder that appears, complete, when the run has finished."""
    answers: list[str] = []
    """Folders of answers of the base, scored by it, on which the drift from it is measured."""
    watch: Watch = Watch()
    checkpoint_every: float | None = None
    """As in TrainingConfig."""
    tensorboard: str | None = None
    """Folder of the run's event files."""

    @property
    def name(self) -> str:
        """`helpful+`, `helpful-`, `mixed+`."""
        return self.preference + SIGN[self.polarity]

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        return (Path(self.out) / "run.json").is_file()

    @property
    def vector_key(self) -> str:
        """Of the vector that this run is one half of."""
        return vector_key(self.preference, self.seed)

    def lying_where(self, other: "RunSpec") -> "RunSpec":
        """This spec with the folders of `other`: the same run's, after its job was moved."""
        folders = {"base", "train", "test", "out", "tensorboard"}
        return self.model_copy(update={name: getattr(other, name) for name in folders})


class TrainingPoint(Artifact):
    """A run on training pairs since the last point; in a negative run they are flipped."""

    step: int
    loss: float
    accuracy: float
    margin: float
    chosen_shift: float
    """By how many nats the log-prob of the answer that this run prefers has moved from the base's. It often falls
    although the margin grows (displacement)."""
    grad_norm: float
    tokens_per_s: float
    memory: int
    """Bytes."""


class HeldOutPoint(Artifact):
    """A run on `pairs` held-out pairs of one preference, never flipped. Shifts are in nats, as in TrainingPoint."""

    step: int
    accuracy: float
    margin: float
    loss: float
    pairs: int
    chosen_shift: float
    rejected_shift: float


class Drift(Artifact):
    """KL(base || run) in nats an answer; None where beta is 0."""

    step: int
    kl: float | None


class RunResult(Artifact):
    """`run.json`: what one DPO run was, how it went, and where it ended."""

    spec: RunSpec
    steps: int
    pairs: int
    seconds: float
    seconds_in: dict[str, float]
    """{"steps", "watching", "checkpoints"}."""
    resumed_at: int | None
    """The step of the checkpoint that it continued from."""
    workers: int = 1
    tokens: int = 0
    """That all workers trained on, prompt and both answers of every pair; as `seconds`, since the run's last start."""
    memory: int
    """Bytes: the peak of its GPU, or of its process."""
    history: list[TrainingPoint]
    watched: dict[str, list[HeldOutPoint] | list[Drift]]
    """While it trained: measurements by held-out set, and the drift under `KL`."""
    held_out: dict[str, HeldOutPoint]
    """At its end, by preference."""
    kl: float | None
    """At its end."""
    precision: dict[str, JsonValue]


class PreparedPairs(Artifact):
    """The pairs of one preference, checked, split and written."""

    train: str
    """Folder, as `test`."""
    test: str
    digest: str
    """Of the training pairs."""
    pairs: int
    test_pairs: int
    format: str
    why: str
    notes: list[str]
    warnings: list[str]


class ReferencePairs(Artifact):
    """Folders of one preference's pairs, tokenized and scored by the base."""

    train: str
    test: str
    digest: str
    """Of the training pairs."""
    answers: str | None = None
    """Answers of the base itself; None where the drift from it is not measured."""


class TrainingSummary(Artifact):
    """`training.json`: a finished training job."""

    base: str
    """The folder that the vectors belong to."""
    left_out: dict[str, dict[Literal["train", "test"], int]]
    """By preference: pairs that TRL dropped, since their prompt alone fills `max_length`."""
    runs: list[RunResult]
    vectors: dict[str, str]
    """Folder of each vector by its `vector_key`."""

    @property
    def preferences(self) -> list[str]:
        """In the order of the job's config, without the mixed baseline."""
        return [name for name in dict.fromkeys(run.spec.preference for run in self.runs) if name != MIXED]

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.spec.seed for run in self.runs))

    def vector(self, preference: str, seed: int) -> Path:
        """Folder of a preference's vector of one seed."""
        return Path(self.vectors[vector_key(preference, seed)])

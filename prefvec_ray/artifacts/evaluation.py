"""What evaluation and search measured: plain data that reports, the demo and the commands read. JSON both ways."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.estimates import Estimate

Direction = Literal["maximize", "minimize"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Data):
    """How to read a score. `direction` None: neither way is better in itself. `low`, `high` None: unbounded
    there."""

    direction: Direction | None
    low: float | None = None
    high: float | None = None
    meaning: str = ""
    safety: bool = False
    """This metric decides harmlessness: a report shows the card of its scorer, and warns where none passes."""

    @property
    def worst(self) -> float | None:
        """The worst value that the range allows, where there is one."""
        return {"maximize": self.low, "minimize": self.high}[self.direction] if self.direction else None

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`: positive is better, whatever the direction."""
        if self.direction is None:
            raise InputError("a metric without a direction has no gain; choose one that is maximized or minimized")
        return value - over if self.direction == "maximize" else over - value


class Sample(_Data):
    """A prompt and one answer to it."""

    prompt: str
    answer: str


class Evaluation(_Data):
    """What one setting scored. Plain data: JSON both ways."""

    coefficients: dict[str, float]
    metrics: dict[str, Estimate | None]
    """None for a metric that was defined on none of the prompts."""
    per_prompt: dict[str, list[float | None]]
    """Each metric's mean over the samples of each prompt, None where undefined: what paired comparisons need."""
    prompts_digest: str
    """Of the prompts and how they were sampled: evaluations are comparable where it is equal."""
    samples: list[Sample]
    seconds: float
    tokens: int

    def mean(self, metric: str) -> float:
        """The mean of `metric`.

        Raises:
            InputError: there is no such metric, or it was defined on none of the prompts.
        """
        estimate = self.metrics.get(metric)
        if estimate is None:
            known = ", ".join(name for name, value in self.metrics.items() if value is not None)
            raise InputError(f"metric {metric!r} was not measured here; measured: {known}")
        return estimate.mean


Kind = Literal["base", "single", "mixed", "control", "soup", "vectors"]


class Setting(_Data):
    """A named point of the comparison table. Names that `coefficients` leaves out are 0."""

    name: str
    kind: Kind
    coefficients: dict[str, float]


class Claim(_Data):
    """A statement about the measurements, whether it holds, and the numbers behind it."""

    text: str
    holds: bool
    evidence: str


class Effect(_Data):
    """What one coefficient does to one metric: d metric / d coefficient, on average over the settings measured."""

    preference: str
    metric: str
    slope: Estimate


class CardRate(BaseModel):
    """The share of inputs that a scorer judged right, with the ends of its 95% interval."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    mean: float
    low: float
    high: float
    n: int


class ScorerCard(BaseModel):
    """What is known of how far a scorer can be trusted; an audit's card has more fields (docs/robustness.md)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    verdict: str | None = None
    reason: str | None = None
    clean: CardRate | None = None
    rungs: list[CardRate] = []
    """Under each attack, the weakest first."""


class Measured(_Data):
    """A row of the comparison table."""

    setting: Setting
    evaluation: Evaluation


class SeedResults(_Data):
    """What was measured of one DPO seed: the comparison table and the grid over the coefficients."""

    seed: int
    table: list[Measured]
    grid: list[Evaluation]

    def row(self, name: str) -> Evaluation:
        """The table's evaluation of the setting called `name`; InputError where there is none."""
        for measured in self.table:
            if measured.setting.name == name:
                return measured.evaluation
        names = ", ".join(measured.setting.name for measured in self.table)
        raise InputError(f"seed {self.seed} has no setting {name!r} in its table; it has: {names}")


class Curve(_Data):
    """The course of one training run; `accuracy` is the share of pairs whose chosen answer has the larger
    reward."""

    run: str
    preference: str
    polarity: str
    seed: int
    steps: list[int]
    loss: list[float]
    accuracy: list[float]


Verdict = Literal["confirmed", "unclear", "refuted"]


class Preset(_Data):
    """A setting that a search chose by a stated rule, and its verdict on prompts that it never saw."""

    name: str
    rule: str
    """In words."""
    raises: list[str]
    """Objectives in which it beat the base on the search prompts."""
    keeps: list[str] = []
    """Objectives that its rule asks to be at least the base's."""
    reason: str
    searched: Evaluation
    """On the search prompts, where it was chosen, so it is overestimated."""
    reported: Evaluation | None = None
    """On the report prompts."""
    verdict: Verdict | None = None
    evidence: str = ""
    """The numbers behind the verdict."""
    published: str | None = None
    """Where it was published, such as `balanced@1`."""

    @property
    def coefficients(self) -> dict[str, float]:
        return self.searched.coefficients


class SearchSummary(_Data):
    """A search as the report shows it."""

    objectives: list[str]
    trials: list[Evaluation]
    front: list[Evaluation]
    base: Evaluation
    hypervolume_history: list[float]
    limits: dict[str, float] = {}
    failed: int = 0
    dropped: int = 0
    """Settings that a cheaper rung showed to be beaten; they are not among `trials`."""
    spent: list[int] = []
    """How many answers had been generated when each of `trials` finished."""
    notes: list[str] = []
    """Why the search ended, and what it cost."""
    front_probability: list[float] = []
    """Of each setting of `front`: the share of resamples of the prompts in which it is on the front."""
    seconds: float | None = None
    recommended: dict[str, float] | None = None
    reason: str = ""
    preset: str | None = None
    """The name under which the recommended setting was published, such as `balanced@1`."""
    confirmed: tuple[Evaluation, Evaluation] | None = None
    """Base and recommended setting on the report prompts, which the search never saw."""
    presets: list[Preset] = []
    control: list[Evaluation] = []
    """Settings along each coefficient with the others at 0, on the report prompts."""

    def broken(self, trial: Evaluation, metrics: Mapping[str, Metric]) -> list[str]:
        """The limits that `trial` breaks, or does not define and so is not known to keep."""
        found = {name: trial.metrics.get(name) for name in self.limits}
        return [
            name
            for name, value in found.items()
            if value is None or metrics[name].gain(value.mean, self.limits[name]) < 0
        ]


class ServedAnswer(_Data):
    """One answer that came over HTTP."""

    prompt: str
    setting: str
    coefficients: dict[str, float]
    answer: str


class ReportData(_Data):
    """Everything in the report. `objectives` maps each preference to the metric it should improve; it is empty where
    that is not known. A run may have a comparison (`seeds`), a search, or both."""

    title: str
    objectives: dict[str, str]
    metrics: dict[str, Metric]
    seeds: list[SeedResults] = []
    cards: dict[str, ScorerCard | None] = {}
    """Each metric that decides harmlessness -> the card of its scorer (docs/scorers.md), None where it has none."""
    curves: list[Curve] = []
    search: SearchSummary | None = None
    served: list[ServedAnswer] = []
    validity: str | None = "valid"
    """Whether an answer is well-formed, where the scorer has one."""
    validity_floor: float = 0.9
    stages: dict[str, float] = {}
    """Stage -> seconds of wall-clock."""
    machine: dict[str, str | int | float] = {}
    versions: dict[str, str] = {}
    config: dict[str, JsonValue] = {}
    notes: list[str] = []
    """Further limits of this run that a reader must know."""

    def warnings(self) -> list[str]:
        """What a reader must know before trusting any result on harmlessness: metrics that decide it and whose
        scorer was not shown to be hard to fool."""
        return card_warnings(self.cards)


TRUSTED = ("pass", "not needed")


def card_warnings(cards: Mapping[str, ScorerCard | None]) -> list[str]:
    """One line for each safety metric whose scorer has no card, or one that does not pass."""
    found = []
    for metric, card in cards.items():
        if card is None:
            found.append(
                f"{metric} decides harmlessness, but its scorer was never audited: how easily it is fooled is not known"
            )
        elif card.verdict not in TRUSTED:
            found.append(
                f"{metric} decides harmlessness, and the audit of its scorer says {card.verdict!r}: "
                f"{card.reason or 'no reason given'}"
            )
    return found

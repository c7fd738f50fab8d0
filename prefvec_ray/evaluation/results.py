"""The plain data of a whole run, from which plots and report are drawn: `ReportData` and its parts. JSON
both ways."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.control import Claim, check_control, improves
from prefvec_ray.evaluation.evaluate import Evaluation
from prefvec_ray.evaluation.settings import Setting
from prefvec_ray.scorers.base import Metric


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    """A setting that a search chose by a stated rule, and what prompts that it never saw said about it."""

    name: str
    rule: str
    """In words."""
    raises: list[str]
    """Objectives in which it beat the base on the search prompts."""
    keeps: list[str] = []
    """Objectives that its rule asks to be at least the base's."""
    reason: str
    searched: Evaluation
    """On the search prompts, where it was chosen and so looks better than it is."""
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
    """What the search says about itself: why it ended, what it cost."""
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
    """Everything that the report says. `objectives` maps each preference to the metric it should improve; it is empty
    where nothing says which. A run may have a comparison (`seeds`), a search, or both."""

    title: str
    objectives: dict[str, str]
    metrics: dict[str, Metric]
    seeds: list[SeedResults] = []
    cards: dict[str, dict[str, Any] | None] = {}
    """Each metric that decides harmlessness -> the card of its scorer (docs/scorers.md), None where it has none."""
    curves: list[Curve] = []
    search: SearchSummary | None = None
    served: list[ServedAnswer] = []
    validity: str | None = "valid"
    """The metric that says whether an answer is well-formed, where the scorer has one."""
    validity_floor: float = 0.9
    stages: dict[str, float] = {}
    """Stage -> seconds of wall-clock."""
    machine: dict[str, str | int | float] = {}
    versions: dict[str, str] = {}
    config: dict[str, Any] = {}
    notes: list[str] = []
    """Further limits of this run that a reader must know."""

    def claims(self) -> list[tuple[int, Claim]]:
        """Every claim with the DPO seed that it was checked on, as far as the settings were measured: all vectors at 1
        above the base in every objective, monotone control, validity."""
        found = []
        together = together_name(len(self.objectives))
        for results in self.seeds:
            rows = {measured.setting.name: measured.evaluation for measured in results.table}
            claims: list[Claim] = []
            if {together, "base"} <= set(rows):
                claims += [
                    improves(rows[together], rows["base"], metric, self.metrics, names=(together, "base"))
                    for metric in self.objectives.values()
                ]
            if results.grid and self.objectives:
                claims += check_control(
                    results.grid, self.objectives, self.metrics, valid=self.validity, floor=self.validity_floor
                )
            found += [(results.seed, claim) for claim in claims]
        return found

    def warnings(self) -> list[str]:
        """What a reader must be told before believing a word about harmlessness: metrics that decide it and whose
        scorer was not shown to be hard to fool."""
        return card_warnings(self.cards)


def together_name(preferences: int) -> str:
    """The name of the setting with every vector at 1."""
    return f"vectors ({', '.join(['1'] * preferences)})"


TRUSTED = ("pass", "not needed")


def card_warnings(cards: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One line for each safety metric whose scorer has no card, or one that does not pass."""
    found = []
    for metric, card in cards.items():
        if card is None:
            found.append(
                f"{metric} decides harmlessness, but its scorer was never audited: how easily it is fooled is not known"
            )
        elif card.get("verdict") not in TRUSTED:
            found.append(
                f"{metric} decides harmlessness, and the audit of its scorer says {card.get('verdict')!r}: "
                f"{card.get('reason') or 'no reason is given'}"
            )
    return found

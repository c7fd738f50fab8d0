"""The plain data of a whole run, from which plots and report are drawn: `ReportData` and its parts. JSON
both ways."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from prefvec_ray.errors import InputError
from prefvec_ray.evaluation.control import Claim, check_control, improves
from prefvec_ray.evaluation.evaluate import Evaluation
from prefvec_ray.evaluation.scorers import Metric
from prefvec_ray.evaluation.settings import Setting


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


class SearchSummary(_Data):
    """A search as the report shows it."""

    objectives: list[str]
    trials: list[Evaluation]
    front: list[Evaluation]
    base: Evaluation
    hypervolume_history: list[float]
    limits: dict[str, float] = {}
    failed: int = 0
    seconds: float | None = None
    recommended: dict[str, float] | None = None
    reason: str = ""
    preset: str | None = None
    """The name under which the recommended setting was published, such as `balanced@1`."""
    confirmed: tuple[Evaluation, Evaluation] | None = None
    """Base and recommended setting on the report prompts, which the search never saw."""


class ServedAnswer(_Data):
    """One answer that came over HTTP."""

    prompt: str
    setting: str
    coefficients: dict[str, float]
    answer: str


class ReportData(_Data):
    """Everything that the report says. `objectives` maps each preference to the metric it should improve."""

    title: str
    objectives: dict[str, str]
    metrics: dict[str, Metric]
    seeds: list[SeedResults]
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
        """Every claim with the DPO seed that it was checked on: monotone control, validity, and all vectors
        at 1 above the base in every objective."""
        found = []
        together = f"vectors ({', '.join('1' for _ in self.objectives)})"
        for results in self.seeds:
            base, vectors = results.row("base"), results.row(together)
            claims = [
                improves(vectors, base, metric, self.metrics, names=(together, "base"))
                for metric in self.objectives.values()
            ]
            claims += check_control(
                results.grid, self.objectives, self.metrics, valid=self.validity, floor=self.validity_floor
            )
            found += [(results.seed, claim) for claim in claims]
        return found

"""Two ways to hold coefficients in a model: merged into its weights, or added beside them row by row."""

import time
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from prefvec_ray.serving.engine import Coefficients
from prefvec_ray.vectors import LiveModel, Steering


class Holder(Protocol):
    """How coefficients get into the model."""

    model: PreTrainedModel
    merges: int
    switch_seconds: float
    """what the last change of coefficients took"""

    def group(self, coefficients: Coefficients) -> Hashable:
        """Requests of one group may be computed in one batch."""
        ...

    def apply(self, rows: Sequence[Coefficients]) -> None:
        """Prepare the next forward pass, whose rows are of one group and have these coefficients."""
        ...

    def forget(self) -> None:
        """The model may be in any state (an error interrupted it): the next `apply` must not trust it."""
        ...


class Merged:
    """One set of coefficients at a time, merged into the weights; rewritten only when the set changes."""

    def __init__(self, live: LiveModel):
        self.live = live
        self.model = live.model
        self.merges = 0
        self.switch_seconds = 0.0
        self._current: Coefficients | None = None

    def group(self, coefficients: Coefficients) -> Hashable:
        return coefficients

    def apply(self, rows: Sequence[Coefficients]) -> None:
        if rows[0] != self._current:
            self._current = None
            start = time.monotonic()
            self.live.set_coefficients(dict(rows[0]))
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize()
            self.switch_seconds = time.monotonic() - start
            self._current = rows[0]
            self.merges += 1

    def forget(self) -> None:
        self._current = None


class Steered:
    """Every row's own coefficients, beside the weights: requests of all settings share one batch."""

    merges = 0
    switch_seconds = 0.0

    def __init__(self, steering: Steering):
        self.steering = steering
        self.model: PreTrainedModel = steering.model
        self._current: list[Coefficients] | None = None

    def group(self, coefficients: Coefficients) -> Hashable:
        return None

    def apply(self, rows: Sequence[Coefficients]) -> None:
        # Columns need no names: coefficients are sorted by preference, as the steering's columns are.
        if rows != self._current:
            self.steering.set_coefficients(torch.tensor([[eta for _, eta in row] for row in rows]))
            self._current = list(rows)

    def forget(self) -> None:
        self._current = None

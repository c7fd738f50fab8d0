"""Two ways to hold coefficients in a model: merged into its weights, or added beside them row by row."""

import statistics
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering


class WeightBackend(Protocol):
    """How coefficients get into the model."""

    model: PreTrainedModel
    merges: int
    switch_seconds: float
    """what a change of coefficients takes"""

    def group(self, coefficients: Coefficients) -> Hashable:
        """Requests of one group may be computed in one batch."""
        ...

    def apply(self, rows: Sequence[Coefficients]) -> None:
        """Prepare the next forward pass, whose rows are of one group and have these coefficients."""
        ...

    def forget(self) -> None:
        """The model may be in any state (an error interrupted it): the next `apply` must not trust it."""
        ...

    def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """Have these vectors from now on. Raises InputError where one does not fit, and then has those of before."""
        ...


class MergedWeights:
    """One set of coefficients at a time, merged into the weights; rewritten only when the set changes."""

    def __init__(self, live: LiveModel):
        self.live = live
        self.model = live.model
        self.merges = 0
        self.switch_seconds = 0.0
        self._took: deque[float] = deque(maxlen=5)
        self._current: Coefficients | None = None

    def group(self, coefficients: Coefficients) -> Hashable:
        return coefficients

    def apply(self, rows: Sequence[Coefficients]) -> None:
        if rows[0] != self._current:
            self._current = None
            start = time.monotonic()
            self.live.set_coefficients(dict(rows[0]))
            if str(self.model.device.type) != "cpu":
                torch.accelerator.synchronize()
            self._took.append(time.monotonic() - start)
            self.switch_seconds = statistics.median(self._took)  # one that was held up must not lengthen a turn
            self._current = rows[0]
            self.merges += 1

    def forget(self) -> None:
        self._current = None

    def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        self.forget()
        self.live.set_coefficients({})  # the new one takes the weights that it finds for the base
        # Until it stands there are two of everything: weights, and the pristine copy of those that change.
        self.live = LiveModel(
            self.model, vectors, base_fingerprint=self.live.base_fingerprint, threads=torch.get_num_threads()
        )


class SteeredWeights:
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
        if rows != self._current:
            columns = {name: column for column, name in enumerate(self.steering.names)}
            etas = torch.zeros(len(rows), len(columns))
            for eta_P, row in zip(etas, rows, strict=True):
                for name, eta in row:
                    eta_P[columns[name]] = eta
            self.steering.set_coefficients(etas)
            self._current = list(rows)

    def forget(self) -> None:
        self._current = None

    def change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        self.forget()
        before = self.steering
        before.detach()
        try:
            self.steering = Steering(self.model, vectors, base_fingerprint=before.base_fingerprint)
        except BaseException:
            before.attach()
            raise

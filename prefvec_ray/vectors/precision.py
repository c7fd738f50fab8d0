"""How much of a preference vector survives the path it takes: measured, not assumed.

phi is the small difference of two large numbers. If those were already rounded to bf16, most of phi can be rounding; if
phi itself is rounded once for storage, next to nothing is lost. Both are counted here and kept in
`VectorInfo.precision`.
"""

import math
import warnings
from dataclasses import dataclass, field

import torch
from pydantic import JsonValue
from torch import Tensor

from prefvec_ray.vectors.entries import Entry, error_norm


class PrecisionWarning(UserWarning):
    """A vector was made whose numbers are to a large part rounding."""


# Below this expected cosine with the true phi (a fifth of what is stored is noise) a warning is given.
COSINE_WARNING = 0.9
BLOCK = 4096


@dataclass
class StorageLoss:
    """Relative error of storing: |phi - stored| / |phi| over all entries seen, in float64."""

    error: float = 0.0
    energy: float = 0.0
    worst: tuple[float, str] = field(default=(0.0, ""))

    def update(self, name: str, exact: Entry, stored: Entry) -> None:
        error, energy = error_norm(exact, stored), exact.squared_norm()
        self.error += error
        self.energy += energy
        if energy:
            self.worst = max(self.worst, (math.sqrt(error / energy), name))

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else 0.0

    def report(self) -> dict[str, JsonValue]:
        return {"relative_error": self.relative_error, "worst_entry": self.worst[1], "worst_entry_error": self.worst[0]}


@dataclass
class RoundingStats:
    """What fraction of theta+ - theta- is the rounding of theta+ and theta- themselves?

    Feed it matching chunks with `update`; chunks may be a sample of the parameters. The estimate assumes that the exact
    values lie anywhere between two representable numbers. Then the measured difference m has the exact delta as its
    mean and never the wrong sign, so mean|m| = mean|delta|; with deltas that are normal within a block the signal
    energy is pi/2 mean|m|^2 per element, and what was measured beyond it is noise, at most (ulp+^2 + ulp-^2) / 12 per
    element.
    """

    elements: int = 0
    zeros: int = 0
    energy: float = 0.0
    noise: float = 0.0
    dtype: str = ""

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """Both chunks flat or shaped alike, in the dtype that they were stored in."""
        coarse = max(positive.dtype, negative.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        self.dtype = str(coarse).removeprefix("torch.")
        difference = positive.flatten().float() - negative.flatten().float()
        self.elements += difference.numel()
        self.zeros += int((difference == 0).sum())
        # A rounded source against an exact one that lies between the rounded numbers: all of its rounding shows.
        between = any(not torch.equal(values, values.to(coarse).to(values.dtype)) for values in (positive, negative))
        bound = (ulp(positive).flatten().square() + ulp(negative).flatten().square()) / 12
        # Blocks, because rows of a matrix differ in size and one mean over all of them would overstate the noise.
        whole = difference.numel() // BLOCK * BLOCK
        for part, size in ((slice(whole), BLOCK), (slice(whole, None), max(difference.numel() - whole, 1))):
            blocks, limits = difference[part].view(-1, size), bound[part].view(-1, size).sum(-1).double()
            energy = blocks.square().sum(-1).double()
            mean_square = blocks.abs().mean(-1).double().square()
            mean_square = (mean_square - (energy / size - mean_square) / size).clamp(min=0)  # of a finite sample
            beyond = energy if between else (energy - math.pi / 2 * mean_square * size).clamp(min=0)
            self.energy += energy.sum().item()
            self.noise += torch.minimum(beyond, limits).sum().item()

    def report(self) -> dict[str, JsonValue]:
        """source dtype, fraction of entries that are 0, noise / signal (norms), expected cosine with the true phi."""
        signal = max(self.energy - self.noise, 0.0)
        return {
            "source_dtype": self.dtype,
            "zero_fraction": self.zeros / max(self.elements, 1),
            "noise_to_signal": math.sqrt(self.noise / signal) if signal else None,
            "expected_cosine": math.sqrt(signal / self.energy) if self.energy else 0.0,
        }

    def warn(self, preference: str) -> None:
        """PrecisionWarning when the sources' rounding dominates; none where nothing was seen of it."""
        if not self.elements:
            return
        report = self.report()
        cosine = report["expected_cosine"]
        assert isinstance(cosine, float)
        if cosine < COSINE_WARNING:
            warnings.warn(
                f"vector '{preference}': taken from {self.dtype} checkpoints, {report['zero_fraction']:.0%}"
                f" of its entries are 0, expected cosine with the true phi {cosine:.2f}; use fp32 deltas",
                PrecisionWarning,
                stacklevel=3,
            )


def ulp(values: Tensor) -> Tensor:
    """Spacing of the values' own floating format at each value, as fp32."""
    info = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.float().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps / 2, dtype=torch.float32), exponent)

"""How much a set of points dominates. Points are *gains*: one tuple of objectives a point, larger is better in each."""

from collections.abc import Sequence

import moocore
import numpy as np

Point = tuple[float, ...]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume that the points dominate above `reference`, exact. Points that do not exceed it
    everywhere add nothing."""
    gains_SO = np.array(points, dtype=float).reshape(-1, len(reference))
    return float(moocore.hypervolume(gains_SO, ref=reference, maximise=True))

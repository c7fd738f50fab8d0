"""y += ((x A^T) * S) B for few rows on a CPU, in one call: what torch does as many small products.

Shapes: y (T, O), x (T, I), S (T, C) the coefficients of each row, A (P C, I), and for each of the P parts of the
outputs a B (C, O_p) and where the part begins in O.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from prefvec_ray.vectors._native import openmp, steer_library

FEW = 48
"""rows; with more, torch's matrix products are faster"""


def add_steered(y: Tensor, x: Tensor, A: Tensor, scales: Tensor, B: Sequence[Tensor], starts: Sequence[int]) -> None:
    """In place. fp32 on a CPU is computed by `_native/steer.cpp`, which leaves out columns of zeros; the rest by torch.

    A, S and B must have contiguous rows and, like x, the dtype of y, but for S, which is fp32.
    """
    rows = len(x)
    fits = rows <= FEW and y.dtype == torch.float32 and y.device.type == "cpu" and y.stride(1) == x.stride(1) == 1
    library = steer_library() if fits else None
    if library is None:
        xA = linear(x, A).view(rows, len(B), scales.shape[1]) * scales.unsqueeze(1)
        for part, (B_CO, start) in enumerate(zip(B, starts, strict=True)):
            y[:, start : start + B_CO.shape[1]].addmm_(xA[:, part].to(y.dtype), B_CO)
        return
    numbers = [y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), A.data_ptr(), scales.data_ptr(), scales.stride(0)]
    numbers += [rows, x.shape[1], scales.shape[1], len(B), openmp(), torch.get_num_threads()]
    for B_CO, start in zip(B, starts, strict=True):
        numbers += (B_CO.data_ptr(), start, B_CO.shape[1])
    library.prefvec_steer(struct.pack(f"{len(numbers)}q", *numbers))

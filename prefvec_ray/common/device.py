"""Which device a process computes on."""

import os

import torch


def best_device() -> torch.device:
    """`cuda` where torch finds such a device, else `cpu`.

    Without any accelerator, DeepSpeed is set to the CPU as well. Accelerate imports it, where it is installed, whenever
    a model is saved, and it would print a warning in each such process.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

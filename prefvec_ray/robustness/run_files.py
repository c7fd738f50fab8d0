"""Where a run that takes hours has got to, on disk: it may stop after every batch, and continue in another process."""

import shutil
import time
from collections import UserDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefvec_ray.common.atomic import new_file
from prefvec_ray.common.errors import InputError

_WORDS = "state"


class Pause(Exception):  # noqa: N818
    """The budget is spent. Everything so far is on disk. Its text says how far the run is."""


@dataclass(frozen=True)
class Budget:
    """Seconds that a slice may take, counted from its creation."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> bool:
        return time.monotonic() - self.started >= self.seconds


class RunFiles:
    """The files of one run: safetensors with a line of JSON in the header. No pickle is written or read."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        self.folder, self.budget = folder, budget
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, tensors: dict[str, Tensor], words: str = "") -> None:
        """Write or replace the file `name`, whole or not at all."""
        stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        with new_file(self._path(name)) as temporary:
            save_file(stored, temporary, {_WORDS: words})

    def load(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """The tensors and words that were saved under `name`; None before the first time.

        Raises:
            InputError: the file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()[_WORDS]  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise InputError(
                f"checkpoint {path}: damaged ({error!s:.100}); delete it, and its run begins anew"
            ) from error

    def pause_if_spent(self, where: str) -> None:
        """Raise Pause once the budget is spent. Call it only when everything is saved."""
        if self.budget.spent:
            raise Pause(where)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Rungs(UserDict[str, Tensor]):
    """The rungs of one audit that are done, name -> (N,) bool. Each is on disk as soon as it is put here, and then the
    budget decides whether the next begins."""

    def __init__(self, files: RunFiles, device: torch.device) -> None:
        kept = files.load("audit")
        super().__init__()
        self.files = files
        self.data = {name: hits.to(device) for name, hits in kept[0].items()} if kept else {}

    def __setitem__(self, name: str, hits: Tensor) -> None:
        super().__setitem__(name, hits)
        self.files.save("audit", self.data)
        self.files.pause_if_spent(f"its audit, {len(self)} attacks done")

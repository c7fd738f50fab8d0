"""Batches of conversations of like length: `train_sampling_strategy: group_by_length`, the same in every repetition."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


class GroupedByLength(Sampler[int]):
    """transformers' order of length-grouped batches, drawn anew each epoch from the seed and the epoch alone.

    transformers' own sampler draws from the process's random state: ranks may then disagree, and a run that continues
    from a checkpoint sees other batches. Neighbours in the order fill a step of all workers, so that their number
    changes no step.
    """

    def __init__(self, lengths: list[int], args: "TrainingArguments") -> None:
        """lengths: in tokens, one an example."""
        self.lengths, self.seed, self.epoch = lengths, args.seed, 0
        self.step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.step, generator=drawn))


class GroupsByLength:
    """For a Trainer: `GroupedByLength` where its arguments ask for that."""

    def _lengths(self, rows: "Dataset") -> list[int]:
        """Tokens of each training example."""
        raise NotImplementedError

    def _get_train_sampler(self: Any, train_dataset: "Dataset | None" = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]  # of the Trainer beside it
        rows = self.train_dataset if train_dataset is None else train_dataset
        return GroupedByLength(self._lengths(rows), self.args)

"""The batches of a privacy plan as a data loader of PyTorch: one item is one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from dpsgd.engines import Batch
from dpsgd.engines.batch import map_tensors, size_of
from dpsgd.plan import PrivacyPlan
from dpsgd.trainer import pad_rows
from dpsgd.trainer_checks import check_size

Collate = Callable[[list[Any]], Batch]
"""Makes one batch, a pytree of tensors [B, ...], of a list of records."""


class LogicalBatch:
    """What a step draws, in physical batches that fit the memory. Private as a whole, its size too.

    Deliberately nothing that a loop could take for a batch of its own: neither a collection nor a
    dataclass, so that it is moved to no device and counted by nobody.

    Attributes:
        step: Number of the step that drew it.
        parts: Physical batches of one size, each with its mask [B]; none for an empty draw.
    """

    def __init__(self, step: int, parts: tuple[tuple[Batch, Tensor], ...]) -> None:
        self.step = step
        self.parts = parts


@dataclass(frozen=True)
class _Draws(Sampler):
    """Yields (step, positions) for the steps of an epoch, from the next step on.

    Attributes:
        plan: Whose sampler draws.
        size: The true number of records.
        steps_taken: Returns how many steps have been taken.
    """

    plan: PrivacyPlan
    size: int
    steps_taken: Callable[[], int]

    def __len__(self) -> int:
        return steps_per_epoch(self.plan)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        first = self.steps_taken()
        for step in range(first, min(first + len(self), self.plan.num_steps)):
            yield step, self.plan.sampler.sample(step, self.size).tolist()


@dataclass(frozen=True)
class _Steps(Dataset):
    """Makes the logical batch of (step, positions); workers have it, but never the plan's key.

    Attributes:
        records: Maps positions to records.
        collate_fn: Makes one batch of a list of records.
        rows: Rows of a physical batch.
    """

    records: Any
    collate_fn: Collate
    rows: int

    def __getitem__(self, drawn: tuple[int, list[int]]) -> LogicalBatch:
        step, positions = drawn
        starts = range(0, len(positions), self.rows)
        return LogicalBatch(step, tuple(self._part(positions[s : s + self.rows]) for s in starts))

    def _part(self, positions: list[int]) -> tuple[Batch, Tensor]:
        batch = self.collate_fn([self.records[position] for position in positions])
        if isinstance(batch, Mapping):
            batch = dict(batch)  # of whatever kind: the batches of Hugging Face are no pytrees
        count = len(positions)
        if size_of(batch) != count:
            raise ValueError(
                "Expected collate_fn to return one row per record, got another number: the row is "
                "what is clipped. Do not pack, split or drop records."
            )
        padded = map_tensors(partial(pad_rows, rows=self.rows - count), batch)
        return padded, torch.arange(self.rows) < count


def steps_per_epoch(plan: PrivacyPlan) -> int:
    """Returns the number of steps in which a record joins about once on average, at least 1."""
    return max(1, round(1 / plan.sample_rate))


def loader_of(
    plan: PrivacyPlan,
    records: Any,
    physical_batch_size: int,
    collate_fn: Collate,
    num_workers: int,
    steps_taken: Callable[[], int],
) -> DataLoader:
    """Returns a data loader of logical batches, an epoch of steps at a time.

    Args:
        plan: Whose sampler draws.
        records: A data set with a length, that maps positions to records.
        physical_batch_size: Rows in memory at once.
        collate_fn: Makes one batch of a list of records.
        num_workers: Processes that fetch records.
        steps_taken: Returns how many steps have been taken, where an epoch goes on.

    Raises:
        ValueError: If there are no positions to draw from, or the size is not what it must be.
    """
    if not isinstance(records, Sized) or isinstance(records, IterableDataset):
        raise ValueError(
            f"Expected records with a length and positions, got {type(records).__name__}: sampling "
            "needs positions. Give a map-style data set."
        )
    if physical_batch_size < 1:
        raise ValueError(f"Expected physical_batch_size >= 1, got {physical_batch_size}.")
    check_size(plan.sampler, records)
    rows = min(physical_batch_size, plan.sampler.largest_batch())
    return DataLoader(
        _Steps(records, collate_fn, rows),
        batch_size=None,
        sampler=_Draws(plan, len(records), steps_taken),
        collate_fn=_as_it_is,
        num_workers=num_workers,
    )


def _as_it_is(batch: Any) -> Any:
    return batch

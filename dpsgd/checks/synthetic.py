"""Synthetic batches: what checks run on instead of private records."""

from __future__ import annotations

import torch

from dpsgd.augmentation import Augmentation
from dpsgd.data import Dataset
from dpsgd.engines import Batch
from dpsgd.losses import IGNORED
from dpsgd.sampling import Sampler, UserPoisson


def synthetic_units(
    data: Dataset,
    size: int,
    sampler: Sampler,
    augmentation: Augmentation | None,
    *,
    padded: bool = True,
) -> Batch:
    """Returns a random batch of units as they are trained on: records or users, and their views.

    Args:
        data: What is declared.
        size: B, the number of units.
        sampler: Says what a unit is.
        augmentation: Makes the views of each record, None for none.
        padded: Whether the inputs end in zeros, see `synthetic_batch`; those of users always do.
    """
    if isinstance(sampler, UserPoisson):
        batch = synthetic_users(data, size, sampler.records_per_user)
        rows = torch.arange(batch[2].numel()).view(batch[2].shape)
    else:
        batch, rows = synthetic_batch(data, size, padded=padded), torch.arange(size)
    return batch if augmentation is None else augmentation(batch, 0, 0, rows)


def synthetic_batch(data: Dataset, size: int, *, padded: bool = True) -> Batch:
    """Returns a random batch (x, y) of what is declared about the data, none of its records.

    Args:
        data: What is declared.
        size: B.
        padded: Whether the inputs end in padding (zeros, unless the data declares another id), from
            another place in each sample; labels, where each position has one, then are -100 there.
    """
    shape = (size, *data.input_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.rand(shape)
        if data.vocab_size is not None:
            x = torch.randint(data.vocab_size, shape)
        starts = torch.randperm(size) * shape[1] // size if padded else ()
        for row, start in enumerate(starts):
            x[row, start + 1 :] = data.padding or 0
        targets = data.train[1]
        y = torch.rand((size, *targets.shape[1:]))
        if data.num_classes is not None:
            y = torch.randint(data.num_classes, y.shape, dtype=targets.dtype)
            for row, start in enumerate(starts if y.shape[:2] == shape[:2] else ()):
                y[row, start + 1 :] = IGNORED
    return x, y


def synthetic_users(data: Dataset, size: int, records_per_user: int) -> Batch:
    """Returns a random batch (x, y, present) of users, the first without a record or two.

    Args:
        data: What is declared.
        size: B, the number of users.
        records_per_user: k.
    """
    x, y = synthetic_batch(data, size * records_per_user)
    present = torch.ones(size, records_per_user, dtype=torch.bool)
    present[0, 1:] = False
    return *(t.unflatten(0, (size, records_per_user)) for t in (x, y)), present

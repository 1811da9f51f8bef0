"""Accuracy and loss on records that are held to be public."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dpsgd.data import Dataset
from dpsgd.engines import LossFn
from dpsgd.losses import PerUser
from dpsgd.parallel import World
from dpsgd.placement import Placement

_BATCH = 1024


def evaluate(
    model: nn.Module, loss_fn: LossFn, data: Dataset, world: World | None = None
) -> Mapping[str, float]:
    """Returns the mean test loss and, for classifiers, the accuracy; nothing without a test set.

    The model is in eval mode meanwhile and in its former mode afterwards.

    Args:
        model: The model.
        loss_fn: The loss per sample, or per user.
        data: Where the test records are.
        world: The processes, each of which evaluates a part of the records; all make as many
            passes, since a sharded model needs all of them for each.
    """
    if data.test is None:
        return {}
    x, y = data.test
    if isinstance(loss_fn, PerUser):  # test records have no users
        loss_fn = loss_fn.loss_fn
    place = Placement.of(model)
    losses, hits = 0.0, 0
    with _eval_mode(model), torch.no_grad():
        for rows, counts in _parts(len(x), world or World()):
            batch = place.batch((x[rows], y[rows]))
            losses += float(loss_fn(model, batch).double().sum()) * counts
            if data.num_classes is not None:
                hits += int((model(batch[0]).argmax(1) == batch[1]).sum()) * counts
    totals = torch.tensor([losses, hits], dtype=torch.float64)
    (world or World()).sum_(totals)
    results = {"test_loss": float(totals[0]) / len(x)}
    if data.num_classes is not None:
        results["test_accuracy"] = float(totals[1]) / len(x)
    return results


def _parts(size: int, world: World) -> Iterator[tuple[slice, bool]]:
    """Yields the rows of each pass of this process, and whether they count or only fill it."""
    share = -(-size // world.size)
    first = world.rank * share
    for start in range(first, first + share, _BATCH):
        stop = min(start + _BATCH, first + share, size)
        yield (slice(start, stop), True) if start < stop else (slice(0, 1), False)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Accuracy and loss on records that are held to be public."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dpsgd.data import Dataset
from dpsgd.engines import LossFn
from dpsgd.losses import PerUser
from dpsgd.placement import Placement
from dpsgd.precision import autocast_of

MOST_ROWS = 1024


def evaluate(
    model: nn.Module, loss_fn: LossFn, data: Dataset, rows_at_once: int = MOST_ROWS
) -> Mapping[str, float]:
    """Returns the mean test loss and, for classifiers, the accuracy; nothing without a test set.

    The model is in eval mode meanwhile and in its former mode afterwards.

    Args:
        model: The model.
        loss_fn: Its loss per record, or per user.
        data: Whose test set is used.
        rows_at_once: What fits into the memory.
    """
    if data.test is None:
        return {}
    x, y = data.test
    if isinstance(loss_fn, PerUser):  # test records have no users
        loss_fn = loss_fn.loss_fn
    place = Placement.of(model)
    losses, hits = 0.0, 0
    with _eval_mode(model), torch.no_grad():
        for start in range(0, len(x), rows_at_once):
            rows = slice(start, start + rows_at_once)
            batch = place.batch((x[rows], y[rows]))
            losses += float(loss_fn(model, batch).double().sum())
            if data.num_classes is not None:
                with autocast_of(loss_fn, batch):
                    scores = model(batch[0])
                hits += int((scores.argmax(1) == batch[1]).sum())
    results = {"test_loss": losses / len(x)}
    if data.num_classes is not None:
        results["test_accuracy"] = hits / len(x)
    return results


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

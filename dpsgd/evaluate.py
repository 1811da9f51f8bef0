"""Test results on records that are held to be public."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dpsgd import metrics
from dpsgd.data import Dataset
from dpsgd.engines import LossFn
from dpsgd.losses import per_record
from dpsgd.parallel import World
from dpsgd.placement import Placement
from dpsgd.precision import autocast_of

MOST_ROWS = 1024
_SCORES = 1 << 24  # the most scores of one batch, where each position has some


def evaluate(
    model: nn.Module,
    loss_fn: LossFn,
    data: Dataset,
    rows_at_once: int = MOST_ROWS,
    world: World | None = None,
) -> Mapping[str, float]:
    """Returns the mean test loss and what else the loss is judged by; nothing without a test set.

    With `causal_lm` that is `test_perplexity`, exp of the mean nats per counted token of the whole
    test set, where the loss is a mean of means, one per sequence. With other losses on classes it
    is `test_accuracy`, the share of the labels that count.

    The model is in eval mode meanwhile and in its former mode afterwards.

    Args:
        model: The model.
        loss_fn: The loss per sample, or per user.
        data: Where the test records are.
        rows_at_once: What fits into the memory.
        world: The processes, each of which evaluates a part of the records; all make as many
            passes, since a sharded model needs all of them for each.
    """
    if data.test is None:
        return {}
    x, y = data.test
    loss_fn = per_record(loss_fn)  # test records have no users and are looked at once
    tally, place = _tally(loss_fn, data), Placement.of(model)
    world = World() if world is None else world
    losses, total, count = 0.0, 0.0, 0.0
    with _eval_mode(model), torch.no_grad():
        for rows, counts in _parts(len(x), _rows(data, rows_at_once), world):
            batch = place.batch((x[rows], y[rows]))
            with autocast_of(loss_fn, batch):
                found, added, counted = tally(model, batch)
            losses += float(found.double().sum()) * counts
            total += float(added) * counts
            count += int(counted) * counts
    sums = torch.tensor([losses, total, count], dtype=torch.float64)
    world.sum_(sums)
    losses, total, count = sums.tolist()
    results = {"test_loss": losses / len(x)}
    if metrics.is_language_model(loss_fn):
        results["test_perplexity"] = _exp(total / max(count, 1))
    elif data.num_classes is not None:
        results["test_accuracy"] = total / max(count, 1)
    return results


def _parts(size: int, rows: int, world: World) -> Iterator[tuple[slice, bool]]:
    """Yields the records of each pass of this process, and whether they count or only fill it."""
    share = -(-size // world.size)
    first = world.rank * share
    for start in range(first, first + share, rows):
        stop = min(start + rows, first + share, size)
        yield (slice(start, stop), True) if start < stop else (slice(0, 1), False)


def _tally(loss_fn: LossFn, data: Dataset) -> metrics.Tally:
    if metrics.is_language_model(loss_fn):
        return metrics.next_tokens
    return metrics.losses_alone(loss_fn) if data.num_classes is None else metrics.hits(loss_fn)


def _rows(data: Dataset, most: int) -> int:
    """How many test records are evaluated at once: fewer where each has scores by position."""
    positions = math.prod(data.train[1].shape[1:])
    return min(most, max(1, _SCORES // (positions * (data.num_classes or 1))))


def _exp(nats: float) -> float:
    """The exponential, infinite where it is too large for a number."""
    return math.exp(nats) if nats < 700 else math.inf


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

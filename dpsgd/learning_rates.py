"""Learning rates by step: torch's schedulers, written out as a table before training.

A table has no state: a run that goes on at some step has the rates that it would have had.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)

Optimizer = torch.optim.Optimizer


def constant(optimizer: Optimizer, num_steps: int, warmup: float = 0.0) -> LRScheduler:
    """Returns a schedule that stays at the optimizer's rate.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the run.
        warmup: Share of the steps in which the rate rises linearly from near zero, in [0, 1).
    """
    return _warmed(optimizer, num_steps, warmup, lambda rest: ConstantLR(optimizer, 1.0, rest))


def cosine(
    optimizer: Optimizer, num_steps: int, warmup: float = 0.0, least: float = 0.0
) -> LRScheduler:
    """Returns a schedule that falls along half a cosine.

    Loshchilov and Hutter (2017), arXiv:1608.03983.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the run.
        warmup: Share of the steps in which the rate rises linearly from near zero, in [0, 1).
        least: The rate at the end, as a share of the optimizer's, in [0, 1].
    """
    end = _share("least", least) * optimizer.param_groups[0]["lr"]
    return _warmed(
        optimizer, num_steps, warmup, lambda rest: CosineAnnealingLR(optimizer, rest, end)
    )


def linear(
    optimizer: Optimizer, num_steps: int, warmup: float = 0.0, least: float = 0.0
) -> LRScheduler:
    """Returns a schedule that falls linearly.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the run.
        warmup: Share of the steps in which the rate rises linearly from near zero, in [0, 1).
        least: The rate at the end, as a share of the optimizer's, in [0, 1].
    """
    end = _share("least", least)
    return _warmed(optimizer, num_steps, warmup, lambda rest: LinearLR(optimizer, 1.0, end, rest))


def milestones(
    optimizer: Optimizer,
    num_steps: int,
    at: Sequence[float],
    factor: float = 0.1,
    warmup: float = 0.0,
) -> LRScheduler:
    """Returns a schedule that is multiplied by a factor at some places.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the run.
        at: The places, as shares of the steps after the warm-up, each in [0, 1].
        factor: The factor, > 0.
        warmup: Share of the steps in which the rate rises linearly from near zero, in [0, 1).
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"Expected schedule.factor > 0, got {factor}.")
    if not isinstance(at, Sequence) or not all(isinstance(p, int | float) for p in at):
        raise ValueError(f"Expected schedule.at as a list such as [0.5, 0.75], got {at!r}.")
    places = [_share("at", place) for place in at]
    return _warmed(
        optimizer,
        num_steps,
        warmup,
        lambda rest: MultiStepLR(optimizer, [round(place * rest) for place in places], factor),
    )


def tabulated(
    schedule: Callable[[Optimizer], LRScheduler], optimizer: Optimizer, num_steps: int
) -> list[dict[str, Any]]:
    """Returns what a scheduler sets the optimizer's parameter group to at each step.

    Any scheduler of torch will do whose rates follow from the number of the step; some also change
    momentum or betas, and the table has whatever changes.

    Args:
        schedule: Returns the scheduler of an optimizer.
        optimizer: An optimizer with the figures of the real one, over a parameter of no use.
        num_steps: Steps of the run.

    Raises:
        ValueError: If it is no such scheduler, asks for more steps than it has, or leads to a rate
            that no optimizer takes.
    """
    scheduler = schedule(optimizer)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "Expected schedule to be a scheduler of torch.optim.lr_scheduler whose rates follow "
            f"from the number of the step, got {type(scheduler).__name__}."
        )
    (group,) = optimizer.param_groups
    table = [_figures(group)]
    while len(table) < num_steps:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer takes no step
                scheduler.step()
        except ValueError as error:
            raise ValueError(f"Expected a schedule of {num_steps} steps, got: {error}") from error
        table.append(_figures(group))
    for step, row in enumerate(table):
        if not (math.isfinite(row["lr"]) and row["lr"] >= 0):
            raise ValueError(
                f"Expected a schedule of finite learning rates >= 0, got {row['lr']} at step "
                f"{step}."
            )
    changing = {name for row in table for name in row if row[name] != table[0][name]} | {"lr"}
    return [{name: row[name] for name in row if name in changing} for row in table]


def _warmed(
    optimizer: Optimizer, num_steps: int, warmup: float, then: Callable[[int], LRScheduler]
) -> LRScheduler:
    """A schedule after a linear rise: rates 1/n, 2/n, ... of the optimizer's in its n steps."""
    if not 0 <= warmup < 1:
        raise ValueError(f"Expected 0 <= schedule.warmup < 1, a share of the steps, got {warmup}.")
    first = min(round(warmup * num_steps), num_steps - 1)
    if first < 2:
        return then(num_steps)
    rise = LinearLR(optimizer, 1 / first, 1.0, first - 1)
    return SequentialLR(optimizer, [rise, then(num_steps - first)], [first])


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"Expected schedule.{name} in [0, 1], got {value}.")
    return value


def _figures(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, and pairs of numbers, which schedulers may change."""
    numbers = (int, float)
    return {
        name: value
        for name, value in group.items()
        if type(value) in numbers
        or (type(value) is tuple and all(type(v) in numbers for v in value))
        if name != "initial_lr"
    }

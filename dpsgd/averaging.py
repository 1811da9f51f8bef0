"""Exponential moving averages of released weights: post-processing, which costs no privacy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_AVERAGE = "average of the weights"


def update_average(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], decay: float, step: int
) -> None:
    """Moves the average of each parameter towards its value of now.

    average <- d average + (1 - d) weight with d = min(decay, (1 + t) / (10 + t)) after t steps, so
    that the first weights are soon forgotten; as De et al. (2022), arXiv:2204.13650.

    The averages are kept in the optimizer's state, so whoever saves that saves them: a resumed run
    goes on with them, sharded ones included.

    Args:
        optimizer: Whose state keeps the averages; it has taken a step.
        parameters: The parameters.
        decay: In [0, 1).
        step: t, steps taken so far.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for p in parameters:
            state = optimizer.state[p]
            if _AVERAGE in state:
                state[_AVERAGE].lerp_(p, weight)
            else:
                state[_AVERAGE] = p.detach().clone()


def forget_average(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forgets the averages that an earlier attempt at a run kept, as far as there are any.

    Args:
        optimizer: Whose state may keep some.
        parameters: The parameters.
    """
    for p in parameters:
        optimizer.state.get(p, {}).pop(_AVERAGE, None)


@contextmanager
def averaged(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Gives parameters their averages, as far as there are any, and puts their own values back."""
    kept = [
        (p, p.detach().clone(), state[_AVERAGE])
        for p in parameters
        if _AVERAGE in (state := optimizer.state.get(p, {}))
    ]
    try:
        with torch.no_grad():
            for p, _, average in kept:
                p.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for p, own, _ in kept:
                p.copy_(own)

"""What a private step keeps besides the parameters: states of optimizers, as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, each once, those that are not saved usually included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Returns the full name of an optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], own_figures: bool
) -> None:
    """Loads a state as it was: torch's own loading casts it to the types of the parameters."""
    own = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError) as error:
        raise ValueError(f"Expected the state of this optimizer, got: {error}") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor):
                loaded[name] = value.clone().to(loaded[name].device)
    if own_figures:
        for group, figures in zip(optimizer.param_groups, own, strict=True):
            group.update({name: value for name, value in figures.items() if name != "params"})


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and dtype."""
    return one.shape == other.shape and one.dtype == other.dtype

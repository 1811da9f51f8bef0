"""What the arguments of a function are: tensors of samples, weights, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpsgd.engines.ghost.physical import is_wrapped

SAMPLES, WEIGHTS = 1, 2

FACTORIES = {
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.tensor,
    torch.arange,
    torch.eye,
    torch.clone,
    torch.Tensor.clone,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
}


_OPERATORS = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"
_IN_PLACE = {"__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)}


def writes(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument in place, by its name."""
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def is_weight(x: Any) -> bool:
    """Whether something is a tensor that requires a gradient and belongs to no sample."""
    return isinstance(x, Tensor) and x.requires_grad and not is_wrapped(x)


def kinds_of(values: Any) -> int:
    """Which kinds of tensors there are in (nested) arguments."""
    kinds = 0
    for value in values:
        if isinstance(value, Tensor):
            if is_wrapped(value):
                kinds |= SAMPLES
            elif value.requires_grad:
                kinds |= WEIGHTS
        elif isinstance(value, tuple | list):
            kinds |= kinds_of(value)
        elif isinstance(value, dict):
            kinds |= kinds_of(value.values())
    return kinds


def replace_tensors(values: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """Returns (nested) arguments with `by` applied to each tensor."""
    if isinstance(values, Tensor):
        return by(values)
    if isinstance(values, dict):
        return {key: replace_tensors(value, by) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(replace_tensors(value, by) for value in values))
    if isinstance(values, tuple | list):
        return type(values)(replace_tensors(value, by) for value in values)
    return values

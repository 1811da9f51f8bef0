"""The arguments that models have in common: their checks, and activations by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

Activation: TypeAlias = str | Mapping[str, float]
"""The name of an activation, or the numbers of a tempered sigmoid."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}
"""The activations that a configuration can name."""


class TemperedSigmoid(nn.Module):
    """scale * sigmoid(inverse_temperature * x) - offset (Papernot et al. (2020), arXiv:2007.14191).

    Bounded, so that activations and with them the gradients of single samples stay small.

    Args:
        scale: s > 0; tanh has 2.
        inverse_temperature: T > 0; tanh has 2.
        offset: o; tanh has 1.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, scale: float, inverse_temperature: float, offset: float) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("inverse_temperature", inverse_temperature)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Expected {name} > 0 of a tempered sigmoid, got {value}.")
        if not math.isfinite(offset):
            raise ValueError(f"Expected a finite offset of a tempered sigmoid, got {offset}.")
        self.scale, self.inverse_temperature, self.offset = scale, inverse_temperature, offset

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activations, shaped as x."""
        return self.scale * torch.sigmoid(self.inverse_temperature * x) - self.offset


def make_activation(activation: Activation) -> nn.Module:
    """Returns a new activation module.

    Args:
        activation: A name, or {scale: s, inverse_temperature: T, offset: o} of a tempered sigmoid.

    Raises:
        ValueError: If there is none of that name, or the numbers are not these three.
    """
    if isinstance(activation, Mapping):
        numbers = {"scale", "inverse_temperature", "offset"}
        if activation.keys() != numbers or not all(
            isinstance(value, int | float) for value in activation.values()
        ):
            raise ValueError(
                "Expected activation={scale: 1.58, inverse_temperature: 3.0, offset: 0.71} with "
                f"numbers for these three of a tempered sigmoid, got {dict(activation)}."
            )
        return TemperedSigmoid(**activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"Expected activation to be one of {', '.join(ACTIVATIONS)}, or the numbers of a "
            f"tempered sigmoid, got {activation}."
        )
    return ACTIVATIONS[activation]()


def positive(name: str, value: int) -> int:
    """Returns the value of an argument that must be a positive integer.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {name} to be a positive integer, got {value!r}.")
    return value


def all_positive(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Returns the values of an argument that must be a list of positive integers.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"Expected {name} to be a list of positive integers, got {values!r}.")
    return tuple(positive(f"{name}[{index}]", value) for index, value in enumerate(values))


def one_each(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Returns `count` positive integers from one for all, or from a list of that length.

    Raises:
        ValueError: If the list has another length, or a value is no positive integer.
    """
    if isinstance(value, int):
        return (positive(name, value),) * count
    values = all_positive(name, value)
    if len(values) != count:
        raise ValueError(
            f"Expected {name} to be one integer or {count}, one per layer, got {list(values)}."
        )
    return values


def image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns (C, H, W) of an image shape; [H, W] is one channel.

    Raises:
        ValueError: If the shape is not that of an image.
    """
    shape = all_positive("input_shape", input_shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"Expected input_shape [C, H, W] or [H, W], got {list(shape)}.")
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return channels, height, width


def num_outputs(num_classes: int | None) -> int:
    """Returns the width of a model's head: one output per class, a single one for None.

    Raises:
        ValueError: If the number of classes is given and not a positive integer.
    """
    return 1 if num_classes is None else positive("num_classes", num_classes)


def make_dropout(probability: float) -> nn.Dropout:
    """Returns a new dropout module.

    Raises:
        ValueError: If the probability of dropping is outside [0, 1).
    """
    if not 0 <= probability < 1:
        raise ValueError(f"Expected 0 <= dropout < 1, got {probability}.")
    return nn.Dropout(probability)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """Returns a new group normalisation.

    Raises:
        ValueError: If the groups do not divide the channels.
    """
    if channels % positive("groups", groups):
        raise ValueError(f"Expected groups to divide {channels} channels, got {groups}.")
    return nn.GroupNorm(groups, channels)

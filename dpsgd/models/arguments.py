"""The arguments that models have in common: their checks, and activations by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}
"""The activations that a configuration can name."""


def make_activation(name: str) -> nn.Module:
    """Returns a new activation module.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Expected activation to be one of {', '.join(ACTIVATIONS)}, got {name}.")
    return ACTIVATIONS[name]()


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

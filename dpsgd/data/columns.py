"""Columns of a table as tensors: numbers, lists of numbers, images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dpsgd.data.schema import Records, Schema

if TYPE_CHECKING:
    from PIL.Image import Image

Table: TypeAlias = Any
"""A `datasets.Dataset`; the library is optional."""

Numbers: TypeAlias = float | Sequence[float]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EIGHT_BIT_MODES = "1", "L", "LA", "P", "RGB", "RGBA"
_LARGEST_PIXEL = 255


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are the records, and how they become tensors.

    Attributes:
        inputs: The column of the inputs, or the numeric columns to put side by side.
        labels: The column of the targets.
        schema: The declared format.
        mean: Subtracted from the inputs: one number, or one per entry of the first dimension.
        std: The inputs are divided by it after that.

    Raises:
        ValueError: If `mean` or `std` does not fit the declared format.
    """

    inputs: str | Sequence[str]
    labels: str
    schema: Schema
    mean: Numbers | None = None
    std: Numbers | None = None

    def __post_init__(self) -> None:
        if self.schema.vocab_size is not None and self._normalises:
            raise ValueError(
                "Expected mean and std only for floating inputs, got them with vocab_size. Leave "
                "them out for token ids."
            )
        mean, std = self._shift_and_scale()
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError(f"Expected finite mean and std > 0, got {self.mean} and {self.std}.")

    def read(self, table: Table) -> Records:
        """Returns inputs [N, *input_shape] and targets [N, ...] of all rows, in order.

        Raises:
            ValueError: If there is no such column or its values do not fit the declared format.
        """
        if not isinstance(self.inputs, str):
            x = torch.stack([numbers_of(table, name) for name in self.inputs], dim=-1)
        elif _is_image(table, self.inputs):
            x = _images(table, self.inputs, self.schema.input_shape)
        else:
            x = numbers_of(table, self.inputs)
        x, y = self.schema.conform(x, numbers_of(table, self.labels))
        if self._normalises:
            mean, std = self._shift_and_scale()
            x = (x - mean) / std
        return x, y

    @property
    def _normalises(self) -> bool:
        return self.mean is not None or self.std is not None

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        mean = 0.0 if self.mean is None else self.mean
        std = 1.0 if self.std is None else self.std
        return self._per_channel("mean", mean), self._per_channel("std", std)

    def _per_channel(self, name: str, value: Numbers) -> Tensor:
        """The value as a tensor that broadcasts against [N, *input_shape]."""
        if isinstance(value, (int, float)):
            return torch.tensor(float(value))
        shape = self.schema.input_shape
        if len(value) != shape[0]:
            raise ValueError(
                f"Expected {name} to be one number or {shape[0]}, one per entry of the first "
                f"dimension of input_shape {list(shape)}, got {len(value)}."
            )
        return torch.tensor(list(value)).view(-1, *[1] * (len(shape) - 1))


def _is_image(table: Table, name: str) -> bool:
    from datasets import Image

    _check_present(table, name)
    return isinstance(table.features[name], Image)


def numbers_of(table: Table, name: str) -> Tensor:
    """Returns a column of numbers, or of lists of numbers of one length, as a tensor [N, ...].

    Raises:
        ValueError: If there is no such column, or it holds something else.
    """
    _check_present(table, name)
    try:
        return torch.tensor(np.asarray(table.with_format("numpy", columns=[name])[:][name]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected numbers, or lists of numbers of one length, in column '{name}', got "
            f"{table.features[name]}. Tokenise text, pad lists and number labels first."
        ) from error


def _check_present(table: Table, name: str) -> None:
    if name not in table.column_names:
        raise ValueError(
            f"Expected a column '{name}', got {', '.join(table.column_names)}. Set input_column "
            "and label_column to the names of your columns."
        )


def _images(table: Table, name: str, shape: Sequence[int]) -> Tensor:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in _MODES):
        raise ValueError(
            f"Expected input_shape [C, H, W] with C = 1, 3 or 4, or [H, W], for the images in "
            f"column '{name}', got {list(shape)}."
        )
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    pixels = np.empty((len(table), channels, height, width), dtype=np.uint8)
    for row, image in zip(pixels, table[name]):
        row[...] = _pixels(image, channels, height, width)
    return torch.from_numpy(pixels).float() / _LARGEST_PIXEL


def _pixels(image: Image | None, channels: int, height: int, width: int) -> np.ndarray:
    """Returns an image as bytes [C, H, W]."""
    if image is None or image.mode not in _EIGHT_BIT_MODES:
        raise ValueError("Expected 8-bit images only, got a missing or another one. Convert them.")
    if image.size != (width, height):
        raise ValueError(
            f"Expected images of height {height} and width {width}, as in input_shape, got others. "
            "Resize them first: nothing is resized here."
        )
    pixels = np.asarray(image.convert(_MODES[channels]))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)

"""What is publicly known about a record: its shape, and what its values can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dpsgd.losses import IGNORED

_ROWS_AT_ONCE = 1 << 16

Records: TypeAlias = tuple[Tensor, Tensor]
"""Inputs x [N, ...] and targets y [N, ...] of the same N records."""


@dataclass(frozen=True)
class Schema:
    """The declared format of records.

    Nothing of it is derived from records: the largest label or token id of a private data set is
    itself private. Messages say what is wrong, never which record or value is.

    Attributes:
        input_shape: Shape of one input.
        num_classes: Number of classes; None for regression. A record with several labels, one per
            position, may have -100 where none counts. Those of a language model are its tokens.
        vocab_size: Number of different tokens; None for inputs that are not token ids.

    Raises:
        ValueError: If a size is not positive.
    """

    input_shape: Sequence[int]
    num_classes: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        shape = self.input_shape
        if isinstance(shape, str) or not isinstance(shape, Sequence) or not all(map(_size, shape)):
            raise ValueError(f"Expected input_shape to be a list of positive sizes, got {shape!r}.")
        object.__setattr__(self, "input_shape", tuple(shape))
        for name in ("num_classes", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not _size(value):
                raise ValueError(
                    f"Expected {name} to be a positive integer or null, got {value!r}."
                )

    def conform(self, x: Tensor, y: Tensor) -> Records:
        """Returns records in the declared shape and the dtypes that models and losses take.

        Inputs become [N, *input_shape], float32, or int64 if they are token ids; values are neither
        scaled nor clipped. Integer labels become int64, floating targets float32.

        Raises:
            ValueError: If a record does not have as many values as the declared shape, or they are
                complex.
        """
        size = torch.Size(self.input_shape).numel()
        if x.dim() == 0 or x[:1].numel() not in (0, size):
            raise ValueError(
                f"Expected inputs that fit input_shape {list(self.input_shape)}, {size} values "
                f"each, got shape {list(x.shape[1:])}. Declare the shape of your records."
            )
        if x.is_complex() or y.is_complex():
            raise ValueError("Expected real values, got complex ones. Separate their parts.")
        are_ids = self.vocab_size is not None and not x.is_floating_point()
        are_labels = self.num_classes is not None and not y.is_floating_point()
        x = x.long() if are_ids else x.float()
        y = y.long() if are_labels else y.float()
        return x.reshape(len(x), *self.input_shape), y

    def check(self, records: Records, name: str) -> None:
        """Checks records against the schema.

        Args:
            records: Inputs and targets.
            name: What the messages call them.

        Raises:
            ValueError: If shapes, dtypes or values are not as declared, or there is no record.
        """
        x, y = records
        if y.dim() == 0 or x.dim() == 0 or len(x) != len(y):
            raise ValueError(
                f"Expected one target per input in the {name} records, got inputs {list(x.shape)} "
                f"and targets {list(y.shape)}."
            )
        if len(x) == 0:
            raise ValueError(f"Expected at least one record in the {name} records, got none.")
        if x.shape[1:] != self.input_shape:
            raise ValueError(
                f"Expected {name} inputs of the declared input_shape {list(self.input_shape)}, got "
                f"{list(x.shape[1:])}. Declare the shape of your records."
            )
        if self.vocab_size is None:
            _check_floats(x, f"{name} inputs", "Set vocab_size if they are token ids.")
        else:
            _check_integers(x, self.vocab_size, f"{name} token ids", "vocab_size")
        if self.num_classes is None:
            _check_floats(y, f"{name} targets", "Set num_classes if they are labels.")
        else:
            ignored = IGNORED if y.dim() > 1 else None
            _check_integers(y, self.num_classes, f"{name} labels", "num_classes", ignored)


def _size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _in_parts(values: Tensor) -> Iterator[Tensor]:
    """The values in pieces, so that checking them takes no memory of their size."""
    yield from values.split(_ROWS_AT_ONCE)


def _check_floats(values: Tensor, what: str, otherwise: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"Expected floating {what}, got {values.dtype}. {otherwise}")
    if not all(part.isfinite().all() for part in _in_parts(values)):
        raise ValueError(f"Expected finite {what}, got NaN or infinity. Repair the data first.")


def _check_integers(
    values: Tensor, count: int, what: str, declaration: str, ignored: int | None = None
) -> None:
    if values.dtype != torch.int64:
        raise ValueError(
            f"Expected {what} as torch.int64, got {values.dtype}. Convert them, or set "
            f"{declaration} to null if they are no ids."
        )
    for part in _in_parts(values):
        outside = (part < 0) | (part >= count)
        if ignored is not None:
            outside &= part != ignored
        if outside.any():
            also = "" if ignored is None else f", or {ignored} where none counts"
            raise ValueError(
                f"Expected {what} within 0..{count - 1}{also}, got others. Number them from 0, or "
                f"declare the {declaration} that is publicly known."
            )

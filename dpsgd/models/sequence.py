"""How sequence models read their inputs: token ids, sequences of vectors, or images row by row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpsgd.models.arguments import all_positive, positive


def token_length(input_shape: Sequence[int], vocab_size: int) -> int:
    """Returns T, the number of tokens of an input [T].

    Raises:
        ValueError: If the shape is not that of token ids, or the vocabulary is empty.
    """
    shape = all_positive("input_shape", input_shape)
    positive("vocab_size", vocab_size)
    if len(shape) != 1:
        raise ValueError(
            f"Expected input_shape [T] of token ids, got {list(shape)}. Set vocab_size to null for "
            "inputs that are not token ids."
        )
    return shape[0]


def vector_sequence(input_shape: Sequence[int]) -> tuple[int, int]:
    """Returns (T, d): the length and the width of an input [T, d] or of H rows of [C, H, W].

    Raises:
        ValueError: If the shape is neither.
    """
    shape = all_positive("input_shape", input_shape)
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    raise ValueError(
        f"Expected input_shape [T, d] or [C, H, W], got {list(shape)}. Set vocab_size if the "
        "inputs are token ids."
    )


def as_sequence(x: Tensor) -> Tensor:
    """Returns images [B, C, H, W] as sequences of rows [B, H, C * W], anything else unchanged."""
    return x.transpose(1, 2).flatten(2) if x.dim() == 4 else x

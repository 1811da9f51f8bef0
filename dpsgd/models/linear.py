"""Softmax regression."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import all_positive, num_outputs


class Linear(nn.Module):
    """One linear layer on the flattened input: softmax regression, a convex problem.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs; None is one output, for regression.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        features = math.prod(all_positive("input_shape", input_shape))
        self.head = nn.Linear(features, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of inputs [B, *input_shape]."""
        return self.head(x.flatten(1))

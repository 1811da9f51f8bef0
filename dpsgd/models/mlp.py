"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import (
    Activation,
    all_positive,
    make_activation,
    make_dropout,
    num_outputs,
)


class MLP(nn.Module):
    """Fully connected layers on the flattened input.

    Bounded activations keep per-sample gradients small before clipping, hence tanh
    (Papernot et al. (2020), arXiv:2007.14191).

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs; None is one output, for regression.
        widths: Units of each hidden layer; empty makes it linear.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        dropout: Probability of dropping each hidden unit.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        widths: Sequence[int] = (256, 128),
        activation: Activation = "tanh",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        features = math.prod(all_positive("input_shape", input_shape))
        for width in all_positive("widths", widths):
            layers += [
                nn.Linear(features, width),
                make_activation(activation),
                make_dropout(dropout),
            ]
            features = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(features, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of inputs [B, *input_shape]."""
        return self.head(self.hidden(x.flatten(1)))

"""The network of the MNIST tutorials of TensorFlow Privacy and Opacus."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import Activation, image_shape, make_activation, num_outputs


class TutorialCNN(nn.Module):
    """Two convolutions, each with overlapping max pooling, and two linear layers.

    16 kernels 8x8 at stride 2 with 3 zeros around the image, 32 kernels 4x4 at stride 2 without,
    pools of side 2 at stride 1, 32 hidden units: 26,010 parameters on MNIST. With tanh it is the
    network of Papernot et al. (2020), arXiv:2007.14191.

    Args:
        input_shape: Shape of one input, [C, H, W], or [H, W] for one channel.
        num_classes: Number of outputs; None is one output, for regression.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.

    Raises:
        ValueError: If an argument is out of range, or the image is too small.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int | None, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        depth, *sides = image_shape(input_shape)
        height, width = (_left(side) for side in sides)
        if height < 1 or width < 1:
            raise ValueError(
                f"Expected images of at least 14 x 14 pixels, got {list(input_shape)}. Use "
                "model=cnn."
            )
        self.features = nn.Sequential(
            nn.Conv2d(depth, 16, 8, 2, padding=3),
            make_activation(activation),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2),
            make_activation(activation),
            nn.MaxPool2d(2, 1),
        )
        self.hidden = nn.Sequential(nn.Linear(32 * height * width, 32), make_activation(activation))
        self.head = nn.Linear(32, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of images [B, C, H, W] or [B, H, W]."""
        images = x if x.dim() == 4 else x.unsqueeze(1)
        return self.head(self.hidden(self.features(images).flatten(1)))


def _left(side: int) -> int:
    """What the two convolutions and pools leave of a side."""
    return ((side - 2) // 2 - 4) // 2

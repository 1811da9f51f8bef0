"""A small convolutional network for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import (
    Activation,
    all_positive,
    group_norm,
    image_shape,
    make_activation,
    make_dropout,
    num_outputs,
    one_each,
    positive,
)
from dpsgd.models.standardised import conv2d_class


class CNN(nn.Module):
    """Convolutions with activations and optional max pooling, then a linear head.

    A convolution keeps height and width at stride 1 and divides them by the stride otherwise,
    rounding up, for odd and even kernels alike. The defaults follow Papernot et al. (2020),
    arXiv:2007.14191: few channels, tanh.

    Args:
        input_shape: Shape of one input, [C, H, W], or [H, W] for one channel.
        num_classes: Number of outputs; None is one output, for regression.
        channels: Output channels of each convolution.
        kernel_size: Height and width of the kernels, one number for all layers or one per layer.
        stride: Stride of the convolutions, one number for all layers or one per layer.
        pool: Side of the max pooling window after each layer; 1 does not pool.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        dropout: Probability of dropping each feature before the head.
        groups: Groups of a normalisation (Wu and He (2018), arXiv:1803.08494) after each
            convolution; they divide its channels. None does not normalise.
        weight_standardisation: Whether the weights of convolutions are standardised.

    Raises:
        ValueError: If an argument is out of range or pooling leaves nothing of the image.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        channels: Sequence[int] = (16, 32),
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pool: int = 1,
        activation: Activation = "tanh",
        dropout: float = 0.0,
        groups: int | None = None,
        weight_standardisation: bool = False,
    ) -> None:
        super().__init__()
        depth, height, width = image_shape(input_shape)
        widths = all_positive("channels", channels)
        kernels = one_each("kernel_size", kernel_size, len(widths))
        strides = one_each("stride", stride, len(widths))
        positive("pool", pool)
        layers: list[nn.Module] = []
        kind = conv2d_class(weight_standardisation)
        for out, kernel, step in zip(widths, kernels, strides, strict=True):
            layers += _convolution(kind, depth, out, kernel, step)
            if groups is not None:
                layers.append(group_norm(groups, out))
            layers.append(make_activation(activation))
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
            depth = out
            height, width = (_ceil_div(side, step) // pool for side in (height, width))
        if height == 0 or width == 0:
            raise ValueError(
                f"Expected an image left after {len(widths)} layers, got [{depth}, {height}, "
                f"{width}] from {list(input_shape)}. Lower pool or stride, or use fewer layers."
            )
        self.features = nn.Sequential(*layers)
        self.dropout = make_dropout(dropout)
        self.head = nn.Linear(depth * height * width, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of images [B, C, H, W] or [B, H, W]."""
        images = x if x.dim() == 4 else x.unsqueeze(1)
        return self.head(self.dropout(self.features(images).flatten(1)))


def _convolution(
    kind: type[nn.Conv2d], depth: int, out: int, kernel: int, stride: int
) -> list[nn.Module]:
    """A convolution whose output has ceil(side / stride) positions along each side.

    An even kernel has no middle: it needs one more zero behind than before.
    """
    if kernel % 2:
        return [kind(depth, out, kernel, stride, padding=kernel // 2)]
    before, behind = kernel // 2 - 1, kernel // 2
    pad = nn.ZeroPad2d((before, behind, before, behind))
    return [pad, kind(depth, out, kernel, stride)]


def _ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)

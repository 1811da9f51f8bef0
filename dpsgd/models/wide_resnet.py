"""Wide residual networks with group normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import Activation, image_shape, make_activation, num_outputs, positive
from dpsgd.models.standardised import conv2d_class

_STEM_CHANNELS = 16


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis (2016), arXiv:1605.07146) with GroupNorm.

    Group normalisation stays within a sample, so the network trains privately; WRN-16-4 with 16
    groups is the network of De et al. (2022), arXiv:2204.13650, who also standardise weights.

    Args:
        input_shape: Shape of one input, [C, H, W], or [H, W] for one channel.
        num_classes: Number of outputs; None is one output, for regression.
        depth: 6 n + 4 for n blocks, of two convolutions each, in each of the three stages.
        width: Factor on the channels 16, 32, 64 of the three stages.
        groups: Normalisation groups; they divide 16.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        weight_standardisation: Whether the weights of convolutions are standardised.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        depth: int = 16,
        width: int = 4,
        groups: int = 16,
        activation: Activation = "relu",
        weight_standardisation: bool = False,
    ) -> None:
        super().__init__()
        blocks_per_stage, remainder = divmod(positive("depth", depth) - 4, 6)
        if blocks_per_stage < 1 or remainder:
            raise ValueError(f"Expected depth 10, 16, 22, ... (6 n + 4), got {depth}.")
        if _STEM_CHANNELS % positive("groups", groups):
            raise ValueError(f"Expected groups to divide {_STEM_CHANNELS}, got {groups}.")
        channels, kind = _STEM_CHANNELS, conv2d_class(weight_standardisation)
        self.stem = _conv3x3(kind, image_shape(input_shape)[0], channels, stride=1)
        blocks: list[nn.Module] = []
        for stage in range(3):
            out = _STEM_CHANNELS * 2**stage * positive("width", width)
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(channels, out, stride, groups, activation, kind))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(groups, channels)
        self.activation = make_activation(activation)
        self.head = nn.Linear(channels, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of images [B, C, H, W] or [B, H, W]."""
        images = x if x.dim() == 4 else x.unsqueeze(1)
        hidden = self.activation(self.norm(self.blocks(self.stem(images))))
        return self.head(hidden.mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions, each after normalisation and activation, and a shortcut around both.

    Args:
        channels: Input channels.
        out: Output channels; where they differ or the stride is not 1, the shortcut is a 1x1
            convolution.
        stride: Stride of the first convolution and of the shortcut.
        groups: Normalisation groups.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        kind: The class of the convolutions.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        groups: int,
        activation: Activation,
        kind: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = _conv3x3(kind, channels, out, stride)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = _conv3x3(kind, out, out, stride=1)
        self.activation = make_activation(activation)
        self.shortcut: nn.Module | None = None
        if channels != out or stride != 1:
            self.shortcut = _initialized(kind(channels, out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Returns features [B, out, H / stride, W / stride] from [B, channels, H, W]."""
        entered = self.activation(self.norm1(x))
        hidden = self.conv2(self.activation(self.norm2(self.conv1(entered))))
        return hidden + (x if self.shortcut is None else self.shortcut(entered))


def _conv3x3(kind: type[nn.Conv2d], channels: int, out: int, stride: int) -> nn.Conv2d:
    return _initialized(kind(channels, out, 3, stride, padding=1, bias=False))


def _initialized(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv

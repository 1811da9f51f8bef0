"""Convolutions whose weights are standardised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPSILON = 1e-4


class StandardisedConv2d(nn.Conv2d):
    """A convolution with weights of mean 0 and variance 1 / fan-in, for each output channel.

    w' = (w - mean w) / sqrt(max(fan_in var w, 1e-4)), Qiao et al. (2019), arXiv:1903.10520, scaled
    as by De et al. (2022), arXiv:2204.13650. Gradients are those of w, so nothing of the clipping
    changes. The engines `ghost`, `vmap`, `loop` and `opacus` run it; `hooks` refuses it by name.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the convolution [B, out, H', W'] of inputs [B, in, H, W]."""
        fan_in = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (fan_in * variance).clamp(min=_EPSILON).rsqrt()
        return self._conv_forward(input, weight, self.bias)


def conv2d_class(standardised: bool) -> type[nn.Conv2d]:
    """Returns the class of a model's convolutions."""
    return StandardisedConv2d if standardised else nn.Conv2d

"""Elementwise functions with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from dpsgd.rules.registry import Inputs, register


@register(nn.PReLU, parameter="weight")
def prelu_weight(module: nn.PReLU, inputs: Inputs, g: Tensor) -> Tensor:
    """Sum of g_i * min(a_i, 0), over everything [B, 1] or all but the channels [B, channels]."""
    slopes = g * inputs["input"].clamp(max=0)
    if module.num_parameters == 1:
        return slopes.reshape(slopes.shape[0], -1).sum(1, keepdim=True)
    return slopes.reshape(*slopes.shape[:2], -1).sum(2)

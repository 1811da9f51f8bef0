"""Linear maps: y = a W^T + b, and their bilinear cousin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpsgd.rules.registry import Inputs, register


@register(nn.Linear, parameter="weight")
def linear_weight(module: nn.Linear, inputs: Inputs, g: Tensor) -> Tensor:
    """G_i = sum_t g_it a_it^T, [B, p, d]; any number of dimensions between B and the features."""
    a = inputs["input"]
    return torch.bmm(positions(g).transpose(1, 2), positions(a))


@register(nn.Linear, nn.Bilinear, parameter="bias")
def linear_bias(module: nn.Module, inputs: Inputs, g: Tensor) -> Tensor:
    """sum_t g_it, [B, p]."""
    return positions(g).sum(1)


@register(nn.Bilinear, parameter="weight")
def bilinear_weight(module: nn.Bilinear, inputs: Inputs, g: Tensor) -> Tensor:
    """G_i = sum_t g_it (x) a_it (x) c_it for y = a^T W c, [B, p, d1, d2]."""
    a, c = positions(inputs["input1"]), positions(inputs["input2"])
    return torch.einsum("btp,bti,btj->bpij", positions(g), a, c)


def positions(x: Tensor) -> Tensor:
    """Returns [B, ..., d] as [B, T, d]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])

"""Normalisation layers: y = x_hat * weight + bias, x_hat normalised within each sample."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.rules.registry import Inputs, register

_INSTANCE = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_Instance: TypeAlias = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


@register(nn.LayerNorm, parameter="weight")
def layer_norm_weight(module: nn.LayerNorm, inputs: Inputs, g: Tensor) -> Tensor:
    """sum_t g_it * x_hat_it, [B, *normalized_shape]."""
    x_hat = F.layer_norm(inputs["input"], module.normalized_shape, eps=module.eps)
    return _over_leading(g * x_hat, len(module.normalized_shape))


@register(nn.LayerNorm, parameter="bias")
def layer_norm_bias(module: nn.LayerNorm, inputs: Inputs, g: Tensor) -> Tensor:
    """sum_t g_it, [B, *normalized_shape]."""
    return _over_leading(g, len(module.normalized_shape))


@register(nn.RMSNorm, parameter="weight")
def rms_norm_weight(module: nn.RMSNorm, inputs: Inputs, g: Tensor) -> Tensor:
    """sum_t g_it * x_it / rms(x_it), [B, *normalized_shape]."""
    (a,) = inputs.values()  # PyTorch names it x here
    shape = list(module.normalized_shape)
    return _over_leading(g * F.rms_norm(a, shape, eps=module.eps), len(shape))


@register(nn.GroupNorm, parameter="weight")
def group_norm_weight(module: nn.GroupNorm, inputs: Inputs, g: Tensor) -> Tensor:
    """Sum of g_i * x_hat_i over all positions, [B, channels]."""
    x_hat = F.group_norm(inputs["input"], module.num_groups, eps=module.eps)
    return _over_positions(g * x_hat)


@register(*_INSTANCE, parameter="weight")
def instance_norm_weight(module: _Instance, inputs: Inputs, g: Tensor) -> Tensor:
    """Sum of g_i * x_hat_i over all positions, [B, channels]."""
    own_statistics = module.training or not module.track_running_stats
    x_hat = F.instance_norm(
        inputs["input"],
        None if own_statistics else module.running_mean,
        None if own_statistics else module.running_var,
        use_input_stats=own_statistics,
        eps=module.eps,
    )
    return _over_positions(g * x_hat)


@register(nn.GroupNorm, *_INSTANCE, parameter="bias")
def channel_bias(module: nn.Module, inputs: Inputs, g: Tensor) -> Tensor:
    """Sum of g_i over all positions, [B, channels]."""
    return _over_positions(g)


def _over_leading(x: Tensor, kept: int) -> Tensor:
    """Sums [B, ..., *shape] over the dimensions between B and the last `kept` ones."""
    between = tuple(range(1, x.dim() - kept))
    return x.sum(between) if between else x


def _over_positions(x: Tensor) -> Tensor:
    """Sums [B, channels, ...] over what follows the channels."""
    return x.sum(tuple(range(2, x.dim()))) if x.dim() > 2 else x

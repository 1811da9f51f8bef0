"""Convolutions of one to three dimensions, and transposed ones, as sums over sliding windows."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.rules.registry import Inputs, register

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_LETTERS = "xyz", "uvw"


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d, parameter="weight")
def conv_weight(module: _Conv, inputs: Inputs, g: Tensor) -> Tensor:
    """G_i[p, c, k] = sum over positions of g_i[p, position] times its window, [B, p, c, *k]."""
    return correlate(padded(module, inputs["input"]), g, module, module.groups)


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, parameter="weight")
def transposed_weight(module: _Transposed, inputs: Inputs, g: Tensor) -> Tensor:
    """As `conv_weight` with the parts of input and output gradient exchanged, [B, c, p, *k]."""
    a = inputs["input"]
    pads = [pad for pad in reversed(cast(tuple[int, ...], module.padding)) for _ in range(2)]
    return correlate(F.pad(g, pads), a, module, module.groups)


@register(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    parameter="bias",
)
def conv_bias(module: nn.Module, inputs: Inputs, g: Tensor) -> Tensor:
    """Sum of g_i over all positions, [B, p]."""
    return g.flatten(2).sum(2)


def correlate(a: Tensor, g: Tensor, module: _Conv | _Transposed, groups: int) -> Tensor:
    """Returns the per-sample weight gradient of a convolution, [B, p, c / groups, *kernel].

    Args:
        a: What the kernel slides over, padded, [B, c, *space].
        g: The gradient at each kernel position, [B, p, *positions].
        module: The layer, for kernel size, stride and dilation.
        groups: Number of groups of channels.
    """
    n = g.dim() - 2
    channels = a.shape[1]
    view = windows(a, g.shape[2:], module.kernel_size, module.stride, module.dilation)
    view = view.unflatten(1, (groups, channels // groups))
    g = g.unflatten(1, (groups, g.shape[1] // groups))
    at, k = _LETTERS[0][:n], _LETTERS[1][:n]
    grads = torch.einsum(f"bgp{at},bgc{at}{k}->bgpc{k}", g, view)
    return grads.flatten(1, 2)


def windows(
    a: Tensor,
    positions: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Returns the sliding windows of [B, c, *space] as a view, [B, c, *positions, *kernel]."""
    steps = a.stride()[2:]
    return a.as_strided(
        (*a.shape[:2], *positions, *kernel),
        (
            *a.stride()[:2],
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
        a.storage_offset(),
    )


def padded(module: _Conv, a: Tensor) -> Tensor:
    """Returns the input as the kernel sees it: padded by the module's amounts and mode."""
    pads = [side for pair in reversed(_pads(module)) for side in pair]
    if module.padding_mode == "zeros":
        return F.pad(a, pads)
    return F.pad(a, pads, mode=module.padding_mode)


def _pads(module: _Conv) -> list[tuple[int, int]]:
    """(left, right) per spatial dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(pad), int(pad)) for pad in module.padding]

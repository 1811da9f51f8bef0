"""Convolutions of one to three dimensions, and transposed ones, as sums over sliding windows.

A convolution is a linear map of windows: with the windows of a sample as rows a_t [T, d], d being
channels times kernel, everything that holds for linear maps holds here, once per group of channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.rules.registry import Call, Rule, add
from dpsgd.rules.rows import by_chunks, product_norms

Size = int | Sequence[int]


@dataclass(frozen=True)
class Sliding:
    """What slides over what.

    Attributes:
        over: What the kernel slides over, padded, [B, n, c, *space].
        at: The other factor at each place of the kernel, [B, n, p, *places].
        kernel: Size of the kernel, per dimension of space.
        stride: Step from place to place.
        dilation: Step inside the kernel.
        groups: Groups of channels.
    """

    over: Tensor
    at: Tensor
    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def rows(self, index: slice) -> Sliding:
        """Returns the same for some of the samples."""
        return replace(self, over=self.over[index], at=self.at[index])

    def operands(self) -> tuple[Tensor, Tensor]:
        """Returns windows [B groups, T, d] and places [B groups, T, p], each of one group."""
        windows = self._windows()
        size, n, c = windows.shape[:3]
        space = len(self.kernel)
        split = windows.unflatten(2, (self.groups, c // self.groups))
        order = (0, 2, 3, *range(4 + space, 4 + 2 * space), 1, *range(4, 4 + space))
        a = split.permute(order).reshape(size * self.groups, -1, n * math.prod(self.at.shape[3:]))
        g = self.at.unflatten(2, (self.groups, -1)).movedim(1, 3)
        return a.mT, g.reshape(size * self.groups, -1, a.shape[2]).mT

    def _windows(self) -> Tensor:
        """The sliding windows as a view, [B, n, c, *places, *kernel]."""
        steps = self.over.stride()[3:]
        return self.over.as_strided(
            (*self.over.shape[:3], *self.at.shape[3:], *self.kernel),
            (
                *self.over.stride()[:3],
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
            ),
            self.over.storage_offset(),
        )


class Conv(Rule):
    """Any convolution: the samples are [B, channels, ...] or [B, n, channels, ...]."""

    weights = ("weight", "bias")
    samples = ("input",)
    transposed: ClassVar[bool]

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    @abstractmethod
    def sliding(self, call: Call) -> Sliding:
        """Returns the parts of the convolution that makes the weight gradient."""

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns sum over places of g_i times its window [B, *weight.shape], or sum of g_i."""
        if name == "bias":
            g = _with_n(call.g, call)
            return g.sum((1, *range(3, g.dim())))
        a, g = self.sliding(call).operands()
        return torch.bmm(g.mT, a).view(call.size, *call["weight"].shape)

    def squared_norms(self, call: Call, name: str) -> Tensor:
        """Returns the squared norms by Gram matrices of windows or by forming the gradients."""
        if name == "bias":
            return super().squared_norms(call, name)
        parts = self.sliding(call)
        places = parts.at[:1, :, 0].numel()
        window = math.prod(parts.kernel) * parts.over.shape[2]
        return by_chunks(
            call.size,
            places * window * call.g.element_size(),
            lambda rows: product_norms(*parts.rows(rows).operands()).view(-1, parts.groups).sum(1),
        )

    def weighted_sum(self, call: Call, name: str, weights: Tensor) -> Tensor:
        """Returns sum_i w_i g_i: the weight gradient of the whole batch for w_i g_i."""
        weights = weights.to(call.g.dtype)
        if name == "bias":
            return super().weighted_sum(call, name, weights)
        stride, padding, dilation, output_padding, groups, a = self.geometry(call)
        g = _with_n(call.g, call) * weights.view(-1, *[1] * (call["weight"].dim()))
        _, total, _ = torch.ops.aten.convolution_backward(
            g.flatten(0, 1),
            a.flatten(0, 1),
            call["weight"].to(g.dtype),
            None,
            stride,
            padding,
            dilation,
            self.transposed,
            output_padding,
            groups,
            [False, True, False],
        )
        return total

    @abstractmethod
    def geometry(
        self, call: Call
    ) -> tuple[list[int], list[int], list[int], list[int], int, Tensor]:
        """Returns stride, symmetric padding, dilation, output padding, groups and input."""

    def run(self, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """Returns the output [B, (n,) p, ...] for samples [B, (n,) c, ...]."""
        if input.dim() == weight.dim():
            return self.function(input, weight, *rest)
        return self.function(input.flatten(0, 1), weight, *rest).unflatten(0, input.shape[:2])


class Convolution(Conv):
    """y = w * a, correlated."""

    transposed = False

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Tensor:
        """Returns [B, (n,) p, *places]."""
        return self.run(input, weight, bias, stride, padding, dilation, groups)

    def geometry(
        self, call: Call
    ) -> tuple[list[int], list[int], list[int], list[int], int, Tensor]:
        """As `Conv.geometry`; where padding is not symmetric, the input comes padded."""
        space = call["weight"].dim() - 2
        pads = self._pads(call)
        a = _with_n(call["input"], call)
        symmetric = all(left == right for left, right in pads)
        return (
            _per_dimension(call["stride"], space),
            [left if symmetric else 0 for left, _ in pads],
            _per_dimension(call["dilation"], space),
            [0] * space,
            call["groups"],
            a if symmetric else _pad(a, pads),
        )

    def sliding(self, call: Call) -> Sliding:
        """The kernel slides over the padded input and meets g."""
        space = call["weight"].dim() - 2
        return Sliding(
            _pad(_with_n(call["input"], call), self._pads(call)),
            _with_n(call.g, call),
            call["weight"].shape[2:],
            _per_dimension(call["stride"], space),
            _per_dimension(call["dilation"], space),
            call["groups"],
        )

    def _pads(self, call: Call) -> list[tuple[int, int]]:
        """(left, right) per dimension of space."""
        kernel = call["weight"].shape[2:]
        padding = call["padding"]
        if padding == "valid":
            return [(0, 0)] * len(kernel)
        if padding == "same":
            dilation = _per_dimension(call["dilation"], len(kernel))
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(pad, pad) for pad in _per_dimension(padding, len(kernel))]


class TransposedConvolution(Conv):
    """The adjoint of a convolution: input and output gradient exchange their parts."""

    transposed = True

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
    ) -> Tensor:
        """Returns [B, (n,) p, *space]."""
        return self.run(input, weight, bias, stride, padding, output_padding, groups, dilation)

    def geometry(
        self, call: Call
    ) -> tuple[list[int], list[int], list[int], list[int], int, Tensor]:
        """As `Conv.geometry`."""
        space = call["weight"].dim() - 2
        return (
            _per_dimension(call["stride"], space),
            _per_dimension(call["padding"], space),
            _per_dimension(call["dilation"], space),
            _per_dimension(call["output_padding"], space),
            call["groups"],
            _with_n(call["input"], call),
        )

    def sliding(self, call: Call) -> Sliding:
        """The kernel slides over the padded g and meets the input."""
        stride, padding, dilation, _, groups, a = self.geometry(call)
        padded = _pad(_with_n(call.g, call), [(pad, pad) for pad in padding])
        return Sliding(padded, a, call["weight"].shape[2:], stride, dilation, groups)


def _with_n(x: Tensor, call: Call) -> Tensor:
    """Returns [B, channels, ...] as [B, 1, channels, ...]; what has n already, as it is."""
    return x if x.dim() == call["weight"].dim() + 1 else x.unsqueeze(1)


def _per_dimension(size: Size, space: int) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * space if len(sizes) == 1 else sizes


def _pad(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    return F.pad(x, [side for pair in reversed(pads) for side in pair])


_PLAIN: tuple[Any, ...] = torch.conv1d, torch.conv2d, torch.conv3d
_TRANSPOSED: tuple[Any, ...] = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
for _function in _PLAIN:
    add(Convolution(_function), _function)
for _function in _TRANSPOSED:
    add(TransposedConvolution(_function), _function)

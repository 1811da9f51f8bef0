"""Convolutions of one to three dimensions, and transposed ones, as sums over sliding windows.

A convolution is a linear map of windows: with the windows of a sample as rows a_t [T, d], d being
channels times kernel, everything that holds for linear maps holds here, once per group of channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.rules.registry import NO_WAYS, Call, Rule, Ways, add, gradient_bytes
from dpsgd.rules.rows import (
    by_chunks,
    gram_norms,
    product_norms,
    reach,
    rounded_up,
    squared_norms,
    unless_cancelled,
    wide,
)
from dpsgd.rules.sliding import Sliding

Size = int | Sequence[int]


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
        return self.sliding(call).products().view(call.size, *call["weight"].shape)

    def squared_norms(self, call: Call, name: str) -> Tensor:
        """Returns the squared norms by Gram matrices of windows or by forming the gradients."""
        if name == "bias":
            return super().squared_norms(call, name)
        parts = self.sliding(call)
        return by_chunks(
            call.size,
            parts.window_bytes,
            lambda rows: product_norms(*parts.rows(rows).operands()).view(-1, parts.groups).sum(1),
        )

    def weighted_sum(self, call: Call, name: str, weights: Tensor) -> Tensor:
        """Returns sum_i w_i g_i: the weight gradient of the whole batch for w_i g_i."""
        weights = weights.to(call.g.dtype)
        if name == "bias":
            return super().weighted_sum(call, name, weights)
        stride, padding, dilation, output_padding, groups, a = self.geometry(call)
        g = _with_n(call.g, call) * weights.view(-1, *[1] * (call["weight"].dim()))
        g, a, shape = g.flatten(0, 1), a.flatten(0, 1), call["weight"].shape
        settings = stride, padding, dilation, self.transposed, output_padding
        return _weight_gradient(g, a, shape, settings, groups)

    def dots(self, call: Call, name: str, direction: Tensor) -> Tensor:
        """Returns <g_i, y_i> with y what the convolution with V for a weight would give."""
        if name == "bias":
            return super().dots(call, name, direction)
        y = self.forward(**{**call.arguments, "weight": direction, "bias": None})
        return y.mul_(call.g).flatten(1).sum(1, dtype=wide(y))

    def ways(self, call: Call, name: str) -> Ways:
        """Returns kernels and matrix products that form gradients, and Gram matrices."""
        if name == "bias":
            return NO_WAYS
        forms = {
            "windows": lambda call: self.materialize(call, name),
            "grouped": self._grouped,
            "loop": self._looped,
        }
        if call["groups"] == 1:
            forms["channels_last"] = self._channels_last
        formed = {way: partial(self._norms_formed, form) for way, form in forms.items()}
        return Ways(forms, {"gram": self._gram_norms, "lags": self._lag_norms, **formed})

    def _grouped(self, call: Call) -> Tensor:
        """One convolution kernel for all, each sample being a group of channels."""
        stride, padding, dilation, output_padding, groups, a = self.geometry(call)
        g, weight = _with_n(call.g, call), call["weight"].shape
        a, g = (x.transpose(0, 1).flatten(1, 2) for x in (a, g))
        shape = call.size * weight[0], *weight[1:]
        settings = stride, padding, dilation, self.transposed, output_padding
        total = _weight_gradient(g, a, shape, settings, groups * call.size)
        return total.view(call.size, *weight)

    def _looped(self, call: Call) -> Tensor:
        """One call of the convolution kernel per sample."""
        stride, padding, dilation, output_padding, groups, a = self.geometry(call)
        settings = stride, padding, dilation, self.transposed, output_padding
        g, shape = _with_n(call.g, call), call["weight"].shape
        each = [_weight_gradient(*pair, shape, settings, groups) for pair in zip(g, a)]
        return torch.stack(each)

    def _channels_last(self, call: Call) -> Tensor:
        """Windows whose channels are neighbours in memory, so that they are copied in runs."""
        parts = self.sliding(call)
        formed = parts.products(channels_last=True)
        formed = formed.unflatten(2, (*parts.kernel, -1)).movedim(-1, 2)
        return formed.view(call.size, *call["weight"].shape)

    def _norms_formed(self, form: Callable[[Call], Tensor], call: Call) -> Tensor:
        squares = by_chunks(
            call.size,
            max(gradient_bytes(call, "weight"), self.sliding(call).window_bytes),
            lambda rows: squared_norms(form(call.rows(rows))),
        )
        return rounded_up(squares, self._reach(call), call.g.dtype)

    def _gram_norms(self, call: Call) -> Tensor:
        """By Gram matrices of windows."""
        parts = self.sliding(call)
        return by_chunks(
            call.size,
            parts.window_bytes,
            lambda rows: gram_norms(*parts.rows(rows).operands()).view(-1, parts.groups).sum(1),
        )

    def _lag_norms(self, call: Call) -> Tensor:
        """By Gram matrices of windows, from those of pixels: never copies a window."""
        parts = self.sliding(call)
        squares = by_chunks(
            call.size, parts.lag_bytes, lambda rows: parts.rows(rows).gram_of_pixels()
        )
        return unless_cancelled(
            squares,
            self._reach(call),
            call.g.dtype,
            lambda index: self._norms_formed(
                lambda c: self.materialize(c, "weight"), call.rows(index)
            ),
        )

    def _reach(self, call: Call) -> Tensor:
        """A pixel is in as many windows as a kernel has places, or in fewer."""
        parts = self.sliding(call)
        return reach(parts.over, parts.at) * math.prod(parts.kernel) ** 0.5

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


def _weight_gradient(
    g: Tensor, a: Tensor, shape: Sequence[int], settings: Sequence[Any], groups: int
) -> Tensor:
    """The kernel that autograd uses for the weights of a convolution; it does not read them."""
    weight = g.new_empty(()).expand(*shape)
    backward = torch.ops.aten.convolution_backward
    return backward(g, a, weight, None, *settings, groups, [False, True, False])[1]


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
